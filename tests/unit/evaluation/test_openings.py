"""The count of test measurements only grows, whoever counts and whenever they are killed."""

import multiprocessing
import os
from pathlib import Path

import pytest

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError
from pfm_llm.data.splits import split_interactions
from pfm_llm.evaluation.openings import (
    OPENINGS_FILE,
    count_opening,
    counts_of,
    describe_openings,
    fingerprint,
    settings_hash,
)
from tests.unit.data.split_cases import FRACTION, LAST_OUT, make

DATA = make([[1, 2, 3, 4, 5, 6, 7], [3, 2, 1, 7]])
SPLIT = split_interactions(DATA, LAST_OUT)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results" / OPENINGS_FILE


def counts(file: Path, **methods: str) -> dict[str, tuple[int, int]]:
    found = count_opening(file, DATA, SPLIT, methods)["methods"]
    return {
        method: (own["times"], own["times_with_these_settings"]) for method, own in found.items()
    }


def count_often(file: Path, times: int) -> None:
    for _ in range(times):
        counts(file, pfm="a")


def count_and_die(file: Path) -> None:
    """Die where the new file is whole but does not have its name yet."""
    files.os.replace = lambda *_: os._exit(9)  # type: ignore[attr-defined]
    counts(file, pfm="a")


def test_each_method_has_its_count_and_so_do_its_settings(file: Path) -> None:
    assert counts(file, pfm="a", popularity="") == {"pfm": (1, 1), "popularity": (1, 1)}
    assert counts(file, pfm="b") == {"pfm": (2, 1)}
    assert counts(file, pfm="a") == {"pfm": (3, 2)}
    assert counts(file, popularity="") == {"popularity": (2, 2)}


def test_looking_at_the_counts_counts_nothing(file: Path) -> None:
    methods = {"pfm": "a", "ease": ""}
    none = {"times": 0, "times_with_these_settings": 0}
    assert counts_of(file, DATA, SPLIT, methods)["methods"] == dict.fromkeys(methods, none)
    counts(file, pfm="b")
    counted = count_opening(file, DATA, SPLIT, {"pfm": "a"})
    for _ in range(2):
        found = counts_of(file, DATA, SPLIT, methods)
        assert found["split"] == counted["split"]
        assert found["methods"] == {**counted["methods"], "ease": none}


def test_another_split_or_other_data_is_counted_apart(file: Path) -> None:
    counts(file, pfm="a")
    half = split_interactions(DATA, FRACTION.model_copy(update={"held_out": 0.5}))
    other = make([[1, 2, 3, 4, 5, 7, 6], [3, 2, 1, 7]])
    found = [
        count_opening(file, data, split, {"pfm": "a"})
        for data, split in ((DATA, half), (other, split_interactions(other, LAST_OUT)))
    ]
    assert [one["methods"]["pfm"]["times"] for one in found] == [1, 1]
    tree = files.read_json(file)
    assert len(tree) == 3
    assert tree[fingerprint(DATA, SPLIT.test)]["rule"] == SPLIT.rule
    assert tree[fingerprint(DATA, SPLIT.test)]["users"] == 2


def test_processes_that_count_at_once_lose_no_count(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_often, args=(file, 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counts(file, pfm="a") == {"pfm": (61, 61)}


def test_a_process_that_is_killed_while_it_writes_leaves_the_file_before(file: Path) -> None:
    counts(file, pfm="a")
    process = multiprocessing.get_context("fork").Process(target=count_and_die, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert counts(file, pfm="a") == {"pfm": (2, 2)}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"a": {"methods": {"m": {"s": "one"}}}}', '{"a": {}}']
)
def test_a_damaged_file_is_refused_and_left_alone(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(CorruptFileError, match=r"test_openings\.json .* restore it"):
        counts(file, pfm="a")
    assert file.read_text() == text


def test_settings_are_the_same_in_any_order() -> None:
    assert settings_hash({"a": 1, "b": None}) == settings_hash({"b": None, "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})


def test_counts_in_words(file: Path) -> None:
    counts(file, pfm="a")
    found = count_opening(file, DATA, SPLIT, {"pfm": "a", "ease": ""})
    assert describe_openings(found, ["pfm", "ease", "other"]) == "pfm 2, ease 1"
    assert describe_openings({}, ["pfm"]) == ""
