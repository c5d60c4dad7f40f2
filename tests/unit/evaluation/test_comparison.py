"""A run beside others: the paired difference, and what cannot be paired."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.evaluation import comparison
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import write_results
from pfm_llm.protocol.types import Mode
from tests.support.suite_double import row

CONFIG = ExperimentConfig(name="paired")
USERS = [3, 5, 8]


def _ranks(*ranks: int) -> Ranks:
    full = np.array(ranks)
    return Ranks(full=full, sampled=full, users=np.array([3, 5, 5, 8][: len(ranks)]))


def _file(folder: Path, **changes: Any) -> Path:
    per_user: dict[str, Any] = {"users": USERS, "ndcg@10": [0.0, 0.5, 1.0]}
    extra = {
        "config": CONFIG.model_dump(mode="json"),
        "per_user": {"test": per_user},
        **changes,
    }
    path = folder / "sasrec.json"
    write_results(path, [row(method="sasrec", mode="none", split="test")], extra)
    return path


def test_the_difference_is_paired_over_users_and_of_the_best_mode(tmp_path: Path) -> None:
    """NDCG@10 is 1, then the mean of 0 and 1, then 1 / log2(4): minus 0, 1/2 and 1."""
    own = {Mode.SHARED_ONLY: _ranks(11, 11, 11, 11), Mode.SHARED_PRIVATE: _ranks(1, 11, 1, 3)}
    trained = comparison.read_references([_file(tmp_path)], CONFIG, "test")
    popular = comparison.ranked_references({"popularity": _ranks(1, 11, 1, 3)})
    first, second = comparison.rows_over(CONFIG, "test", own, [*trained, *popular])
    assert (first.metric, first.mode, first.split) == ("ndcg_over_sasrec", "shared_private", "test")
    assert first.value == pytest.approx((1.0 + 0.0 - 0.5) / 3)
    assert first.ci_low <= first.value <= first.ci_high
    assert (second.metric, second.value, second.ci_low) == ("ndcg_over_popularity", 0.0, 0.0)
    alone = {Mode.SHARED_ONLY: _ranks(1, 1, 1, 1)}
    (shared,) = comparison.rows_over(CONFIG, "test", alone, trained)
    assert shared.mode == "shared_only"
    assert shared.value == pytest.approx((1.0 + 0.5 + 0.0) / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_user": {}}, "does not say what each user got on test"),
        ({"per_user": {"test": {"gain_ndcg": [0.1]}}}, "does not say what each user got"),
        ({"config": {"data": {"source": "elsewhere"}}}, "on other data"),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        comparison.read_references([_file(tmp_path, **changes)], CONFIG, "test")


def test_a_sample_of_users_is_another_with_another_seed(tmp_path: Path) -> None:
    data = {"max_users": 3}
    drawn = ExperimentConfig(name="paired", seed=1, data=data)
    same = _file(tmp_path, config=drawn.model_dump(mode="json"))
    assert comparison.read_references([same], drawn, "test")
    with pytest.raises(DataError, match="on other data, users"):
        comparison.read_references(
            [same], ExperimentConfig(name="paired", seed=2, data=data), "test"
        )
    apart = {**data, "users_per_client": 4}
    nothing = {"private": {"enabled": False}}  # a taste is one user's
    silos = ExperimentConfig(name="paired", seed=1, data=apart, adapters=nothing)
    assert comparison.read_references([same], silos, "test")
    with pytest.raises(DataError, match="two files are of sasrec"):
        comparison.read_references([same, same], drawn, "test")


@pytest.mark.parametrize("ndcg", [[0.1, 0.2], "x", None])
def test_a_damaged_file_is_no_reference(tmp_path: Path, ndcg: Any) -> None:
    path = _file(tmp_path, per_user={"test": {"users": USERS, "ndcg@10": ndcg}})
    with pytest.raises(CorruptFileError, match=r"sasrec\.json"):
        comparison.read_references([path], CONFIG, "test")


def test_other_users_are_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, per_user={"test": {"users": [3, 5, 9], "ndcg@10": [0.0, 0.5, 1.0]}})
    references = comparison.read_references([path], CONFIG, "test")
    own = {Mode.SHARED_ONLY: _ranks(1, 11, 1, 3)}
    with pytest.raises(DataError, match="other users"):
        comparison.rows_over(CONFIG, "test", own, references)
