"""The metrics as `evaluate.load` finds them: offline, by path, with predictions and references."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import evaluate
import numpy as np
import pytest

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.list_metrics import FOLDER
from pfm_llm.evaluation.metrics import RANK_METRICS, mean_over_users

LISTS = [[4, 7, 1], [3, 9, 2], [5, 6, 8]]
RELEVANT = [4, 2, 1]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], evaluate.Metric]]:
    """``evaluate.load`` by folder; it keeps its copies of scripts in a folder of the tests."""
    folder = tmp_path_factory.mktemp("evaluate")
    package = folder / "evaluate_modules"
    package.mkdir()
    (package / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        # Its own folder is fixed when evaluate is imported, which is too early for a variable.
        patch.setattr(evaluate.loading, "init_dynamic_modules", lambda: str(package))
        patch.syspath_prepend(str(folder))
        yield lambda name: evaluate.load(str(FOLDER / name), cache_dir=str(folder / "cache"))


@pytest.mark.parametrize(
    ("name", "expected"),
    # Ranks 1 and 3, and a miss.
    [("ndcg", (1 + 1 / math.log2(4)) / 3), ("hit_rate", 2 / 3), ("mrr", (1 + 1 / 3) / 3)],
)
def test_every_metric_loads_by_its_folder_and_takes_items_of_either_kind(
    load: Any, name: str, expected: float
) -> None:
    metric = load(name)
    found = metric.compute(predictions=LISTS, references=RELEVANT)
    assert found == {f"{name}@10": pytest.approx(expected)}
    words = [[f"i{item}" for item in own] for own in LISTS]
    of_words = metric.compute(predictions=words, references=[f"i{item}" for item in RELEVANT], k=2)
    assert of_words == {f"{name}@2": pytest.approx(1 / 3)}


def test_there_is_one_for_each_of_our_metrics() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.name[0] != "_"} == RANK_METRICS.keys()


def test_lists_of_one_user_count_once_and_may_come_in_batches(load: Any) -> None:
    metric = load("mrr")
    metric.add_batch(predictions=LISTS[:1], references=RELEVANT[:1])
    metric.add_batch(predictions=LISTS[1:], references=RELEVANT[1:])
    found = metric.compute(groups=["ann", "bob", "ann"], k=3)
    ranks, users = np.array([1, 3, 4]), np.array([0, 1, 0])
    assert found == {"mrr@3": mean_over_users(RANK_METRICS["mrr"](ranks, 3), users)}
    assert found["mrr@3"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_several_relevant_items_count_by_their_mean_and_text_is_not_read_as_numbers(
    load: Any,
) -> None:
    """Ranks 1 and 3 of the first list, none of the second."""
    found = load("mrr").compute(predictions=[[4, 7, 1], [3, 9, 2]], references=[[4, 1], [5]])
    assert found == {"mrr@10": pytest.approx((1 + 1 / 3) / 2 / 2)}
    found = load("hit_rate").compute(predictions=[["07", "1"], ["7"]], references=["7", "7"])
    assert found == {"hit_rate@10": 0.5}


def test_what_cannot_be_computed_is_an_error_of_ours(load: Any) -> None:
    metric = load("ndcg")
    with pytest.raises(ConfigError, match="holds 0"):
        metric.compute(predictions=LISTS, references=RELEVANT, k=0)
    with pytest.raises(DataError, match="give one each"):
        metric.compute(predictions=LISTS, references=RELEVANT, groups=[1])
    with pytest.raises(DataError, match="nothing to average"):
        metric.compute(predictions=[[1]], references=[[]])
