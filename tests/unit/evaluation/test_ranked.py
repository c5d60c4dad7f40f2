"""Ranked lists as other tools read them: the same figures, odd ids, ties and short catalogues."""

from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
import pytest
from ir_measures import RR, Success, nDCG

from pfm_llm.evaluation import metrics
from pfm_llm.evaluation.ranked import write_ranked
from pfm_llm.evaluation.ranking import Ranks, rank_all
from tests.support.queries import held_out_of

KS = (1, 5, 12)
MEASURES = {"ndcg": nDCG, "hit_rate": Success, "mrr": RR}
ITEMS = [f"film {n}: 50 % \u2764" for n in range(40)]
USERS = ["a", "b c", "b%20c", "d#2", "\u00e9\t", "Q0"]


def ranked(folder: Path, targets_each: int, depth: int = max(KS)) -> Ranks:
    """Six users with scores of few values, so that there are ties, and one with NaN."""
    random = np.random.default_rng(2)
    items = [random.permutation(len(ITEMS)) for _ in USERS]
    held_out = held_out_of(
        [own[:10].tolist() for own in items],
        [own[10 : 10 + targets_each].tolist() for own in items],
    )
    scores = random.integers(0, 8, (len(USERS), len(ITEMS))).astype(np.float32)
    scores[5, ::3] = np.nan
    negatives = np.full((len(USERS) * targets_each, 1), -1)
    ranks = rank_all(lambda queries: scores[list(queries)], held_out, negatives, 4, depth)
    write_ranked(folder, held_out, {"pfm": ranks, "ease": ranks}, USERS, ITEMS)
    return ranks


def by_query(run: object, qrels: object) -> dict[tuple[str, str], float]:
    measures = [measure @ k for measure in MEASURES.values() for k in KS]
    found = ir_measures.iter_calc(measures, qrels, run)
    return {(str(one.measure), one.query_id): one.value for one in found}


def averaged(values: dict[tuple[str, str], float], measure: str) -> float:
    """The mean over users of the mean over a user's queries."""
    own: dict[str, list[float]] = {}
    for (name, query), value in values.items():
        if name == measure:
            own.setdefault(query.partition("#")[0], []).append(value)
    assert len(own) == len(USERS)
    return float(np.mean([np.mean(one) for one in own.values()]))


@pytest.mark.parametrize("targets_each", [1, 3])
def test_ir_measures_finds_our_figures_in_both_formats(tmp_path: Path, targets_each: int) -> None:
    ranks = ranked(tmp_path / "test", targets_each)
    names = {"q_id": "query_id", "score": "relevance"}
    of_parquet = (
        pd.read_parquet(tmp_path / "test" / "pfm.parquet").rename(columns={"q_id": "query_id"}),
        pd.read_parquet(tmp_path / "test" / "qrels.parquet").rename(columns=names),
    )
    of_trec = (
        list(ir_measures.read_trec_run(str(tmp_path / "test" / "pfm.txt"))),
        list(ir_measures.read_trec_qrels(str(tmp_path / "test" / "qrels.txt"))),
    )
    for run, qrels in (of_parquet, of_trec):
        values = by_query(run, qrels)
        for name, measure in MEASURES.items():
            for k in KS:
                ours = metrics.mean_over_users(
                    metrics.RANK_METRICS[name](ranks.full, k), ranks.users
                )
                assert averaged(values, str(measure @ k)) == pytest.approx(ours, abs=1e-6)
    assert 0 < metrics.hit_rate(ranks.full, 12).mean() < 1


def test_the_tables_are_those_that_ranx_reads_and_no_two_users_share_a_name(tmp_path: Path) -> None:
    ranked(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("ease.parquet", "ease.txt", "pfm.parquet", "pfm.txt", "qrels.parquet", "qrels.txt"),
    ]
    run, qrels = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("pfm", "qrels"))
    for table in (run, qrels):
        assert list(table.columns) == ["q_id", "doc_id", "score"]
        assert pd.api.types.is_string_dtype(table.q_id)
        assert not table.duplicated(["q_id", "doc_id"]).any()
        assert table.q_id.nunique() == 2 * len(USERS)
    # ranx refuses other types.
    assert (run.score.dtype, qrels.score.dtype) == (np.float64, np.int64)
    assert qrels.q_id.tolist()[:4] == ["a", "a#2", "b%20c", "b%20c#2"]
    assert (run.groupby("q_id").score.max() == max(KS)).all()
    # Within a query the scores have no ties, so that no tool breaks one.
    assert not run.duplicated(["q_id", "score"]).any()
    assert all(len(line.split()) == 6 for line in (tmp_path / "pfm.txt").read_text().splitlines())


def test_a_list_is_as_long_as_its_candidates(tmp_path: Path) -> None:
    """Of 40 items 10 are in the history."""
    ranks = ranked(tmp_path, 1, depth=100)
    assert ranks.lists is not None
    assert ((ranks.lists >= 0).sum(1) == 30).all()
    assert len(pd.read_parquet(tmp_path / "pfm.parquet")) == 30 * len(USERS)


def test_the_folder_of_lists_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    ranked(tmp_path / "out" / "test", 1)
    assert (tmp_path / "out" / "test").stat().st_mode & 0o777 == 0o700
