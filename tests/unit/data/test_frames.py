"""Frames and data sets in memory, as they come: index, mixed types, columns of anything."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.data.frames import load_dataset

ROWS: dict[str, Any] = {
    "userId": [7, 7, 7],
    "movieId": [1, 2, 3],
    "time": pd.to_datetime([1.5e9, 1.5e9 + 2, 1.5e9 + 1], unit="s"),
    "name": ["Ash", "Birch", "Cedar"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(ROWS),
        pd.DataFrame(ROWS).set_index("userId"),
        pd.DataFrame(ROWS).set_index(["userId", "movieId"]),
        pd.DataFrame({**ROWS, "userId": pd.Categorical(["7"] * 3)}),
        pd.DataFrame({**ROWS, "meta": [{"a": 1}, 2, None], "vector": [np.zeros(2)] * 3}),
        pd.DataFrame({**ROWS, "image": [b"\xff\x00"] * 3}),
        pd.DataFrame({**ROWS, "movieId": [1, "2", 3]}),
    ],
    ids=["plain", "index", "two levels", "category", "mixed", "bytes", "mixed ids"],
)
def test_a_frame_needs_no_preparation(frame: pd.DataFrame) -> None:
    interactions = load_dataset(frame)
    assert interactions.user_ids == ("7",)
    assert interactions.catalogue.item_ids == ("1", "2", "3")
    assert interactions.items.tolist() == [0, 2, 1]
    assert interactions.catalogue.fields["title"] == ("Ash", "Birch", "Cedar")


def test_columns_that_are_numbers_may_be_named() -> None:
    frame = pd.DataFrame(dict(enumerate(ROWS.values())))
    named = dict(zip(("user", "item", "timestamp", "title"), "0123", strict=True))
    assert load_dataset(frame, **named).items.tolist() == [0, 2, 1]


def test_one_name_for_two_columns_is_refused() -> None:
    frame = pd.DataFrame([[1, 2]], columns=["x", "x"])
    with pytest.raises(DataError, match="the DataFrame: column 'x' comes twice"):
        load_dataset(frame)


def test_a_missing_id_is_a_bad_row() -> None:
    frame = pd.DataFrame({**ROWS, "movieId": [1, None, 3]})
    with pytest.raises(DataError, match="row 2: empty item id"):
        load_dataset(frame)


def test_a_data_set_with_images_and_nested_values() -> None:
    columns = {name: list(map(str, values)) for name, values in ROWS.items()}
    more = {"image": [b"\xff"] * 3, "meta": [{"a": 1}] * 3}
    interactions = load_dataset(datasets.Dataset.from_dict({**columns, **more}))
    assert interactions.items.tolist() == [0, 2, 1]
