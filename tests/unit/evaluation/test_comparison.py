"""A run beside others: the paired difference, and what cannot be paired."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.config.schema import ExperimentConfig, parse_config
from pfm_llm.evaluation import comparison
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import write_results
from pfm_llm.protocol.types import Mode
from tests.support.suite_double import row

CONFIG = ExperimentConfig(name="paired")
SHARED_ONLY = parse_config({"name": "paired", "method": "shared_only"})
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


def test_the_difference_is_paired_over_users_and_of_the_mode_that_is_judged(tmp_path: Path) -> None:
    """NDCG@10 is 1, then the mean of 0 and 1, then 1 / log2(4): minus 0, 1/2 and 1."""
    own = {Mode.SHARED_ONLY: _ranks(11, 11, 11, 11), Mode.SHARED_PRIVATE: _ranks(1, 11, 1, 3)}
    trained = comparison.read_references([_file(tmp_path)], CONFIG, "test")
    popular = comparison.ranked_references({"popularity": _ranks(1, 11, 1, 3)})
    first, second = comparison.rows_over(CONFIG, "test", own, [*trained, *popular])
    assert (first.metric, first.mode, first.split) == ("ndcg_over_sasrec", "shared_private", "test")
    assert first.value == pytest.approx((1.0 + 0.0 - 0.5) / 3)
    assert first.ci_low <= first.value <= first.ci_high
    assert (second.metric, second.value, second.ci_low) == ("ndcg_over_popularity", 0.0, 0.0)
    (shared,) = comparison.rows_over(
        SHARED_ONLY, "test", {Mode.SHARED_ONLY: _ranks(1, 1, 1, 1)}, trained
    )
    assert shared.mode == "shared_only"
    assert shared.value == pytest.approx((1.0 + 0.5 + 0.0) / 3)


def test_the_shared_part_alone_is_compared_where_it_is_asked_for() -> None:
    own = {Mode.SHARED_ONLY: _ranks(1, 1, 1, 1), Mode.SHARED_PRIVATE: _ranks(3, 3, 3, 3)}
    popular = comparison.ranked_references({"popularity": _ranks(3, 3, 3, 3)})
    rows = comparison.rows_over(CONFIG, "test", own, popular, of_shared=True)
    found = {row.metric: row.value for row in rows}
    assert found == {"ndcg_over_popularity": 0, "ndcg_over_popularity_shared": pytest.approx(0.5)}
    (only,) = comparison.rows_over(SHARED_ONLY, "test", own, popular, of_shared=True)
    assert only.metric == "ndcg_over_popularity"


def test_differences_are_at_the_cut_off_that_the_config_measures(tmp_path: Path) -> None:
    """With ks 2 and 20 it is NDCG@2: ranks 1 and 3 give 1 and 0, and not 1 / log2(4)."""
    config = parse_config({"name": "paired", "evaluation": {"ks": [2, 20]}})
    ranks = {Mode.SHARED_ONLY: _ranks(3, 3, 3, 3), Mode.SHARED_PRIVATE: _ranks(1, 3, 3, 3)}
    popular = comparison.ranked_references({"popularity": _ranks(1, 3, 3, 3)}, 2)
    (row,) = comparison.rows_over(config, "test", ranks, popular)
    assert (row.metric, row.k, row.value) == ("ndcg_over_popularity", 2, 0.0)
    _, gain = comparison.gain_rows(config, "test", ranks, {})
    assert (gain.metric, gain.k, gain.value) == ("gain_ndcg", 2, pytest.approx(1 / 3))
    with pytest.raises(DataError, match="has no ndcg@2 of single users on test"):
        comparison.read_references([_file(tmp_path)], config, "test")


def test_the_gain_is_what_the_private_part_adds_to_the_shared_one() -> None:
    """Ranks 2 and 1 become 1 and 2: the log-rank gains ln 2 and loses ln 2 / 2 of two targets."""
    ranks = {
        Mode.SHARED_ONLY: _ranks(2, 1, 1, 1),
        Mode.PRIVATE_ONLY: _ranks(1, 1, 1, 1),
        Mode.SHARED_PRIVATE: _ranks(1, 2, 1, 1),
    }
    aucs = {mode: np.array([0.5, np.nan, 0.75]) for mode in ranks}
    rows = comparison.gain_rows(CONFIG, "test", ranks, aucs)
    assert [(row.task, row.metric, row.k) for row in rows] == [
        ("next_item", "gain_log_rank", 0), ("next_item", "gain_ndcg", 10), ("like", "gain_auc", 0)
    ]  # fmt: skip
    assert {(row.mode, row.split) for row in rows} == {("shared_private", "test")}
    assert rows[0].value == pytest.approx((np.log(2) - np.log(2) / 2) / 3)
    assert (rows[2].value, rows[2].num_users) == (0.0, 2)
    over = comparison.gains(ranks, {}, comparison.bootstrap_of(CONFIG), Mode.PRIVATE_ONLY)
    (figures,) = over.values()
    assert figures["gain_log_rank_over_private"].value == pytest.approx(-np.log(2) / 2 / 3)
    assert comparison.gain_rows(SHARED_ONLY, "test", ranks, aucs) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_user": {}}, "has no figures of single users on test"),
        ({"per_user": {"test": {"gain_ndcg": [0.1]}}}, "has no figures of single users"),
        ({"config": {"data": {"source": "elsewhere"}}}, "on other data"),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        comparison.read_references([_file(tmp_path, **changes)], CONFIG, "test")


def test_a_baseline_of_an_earlier_version_lacks_settings_of_data_that_are_at_their_defaults(
    tmp_path: Path,
) -> None:
    config = CONFIG.model_dump(mode="json")
    del config["data"]["met_items_only"], config["data"]["columns"]["items_item"]
    found = comparison.read_references([_file(tmp_path, config=config)], CONFIG, "test")
    assert len(found) == 1


def test_a_sample_of_users_is_another_with_another_seed(tmp_path: Path) -> None:
    data = {"max_users": 3}
    drawn = ExperimentConfig(name="paired", seed=1, data=data)
    same = _file(tmp_path, config=drawn.model_dump(mode="json"))
    assert comparison.read_references([same], drawn, "test")
    with pytest.raises(DataError, match="on other data, users"):
        comparison.read_references(
            [same], ExperimentConfig(name="paired", seed=2, data=data), "test"
        )
    silos = ExperimentConfig(
        name="paired",
        seed=1,
        data={**data, "users_per_client": 4},
        method="custom",
        adapters={"private": {"enabled": False}},
    )
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
    own = {Mode.SHARED_PRIVATE: _ranks(1, 11, 1, 3)}
    with pytest.raises(DataError, match="other users"):
        comparison.rows_over(CONFIG, "test", own, references)
