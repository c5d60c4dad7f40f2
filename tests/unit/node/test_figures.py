"""Sums of nodes give the means of one process, and small nodes give nothing."""

from pathlib import Path

import numpy as np
import pytest

from pfm_llm.base.processes import Processes
from pfm_llm.evaluation import metrics
from pfm_llm.federation.figures import combine, count_items, evaluate_nodes, evaluation_of
from pfm_llm.federation.members import meet
from pfm_llm.node.link import LocalLink
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.messages import EvaluateReply, Figure
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.measuring import evaluation_task, fit_run_baselines, measure, rank_baselines
from tests.conftest import TinyRun
from tests.support.nodes import make_site, side_of, site_tree
from tests.support.tiny import Tiny, random_histories, write_interactions

MODES = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)


def test_nodes_measure_what_one_process_does_and_a_small_one_withholds(
    tiny: Tiny, tiny_run: TinyRun, one_process: Processes, tmp_path: Path
) -> None:
    everybody = list(random_histories(50, seed=3).items())
    parts = {"n01": everybody[:21], "n02": everybody[21:43], "n03": everybody[43:]}
    links = {}
    for node, own in parts.items():
        write_interactions(tmp_path / f"{node}.csv", dict(own))
        links[node] = Worker(make_site(tiny, tmp_path, node), one_process)
    link, side = LocalLink(links), side_of(tiny, tmp_path, method="pfm")
    assert meet(side, link, link.nodes).keys() == parts.keys()
    counts = count_items(side, link)
    assert counts is not None
    request = evaluation_of(side, "test", MODES, (5,))
    found = evaluate_nodes(side, link, side.model.shared, request, counts)

    # The reference has the users of the two large nodes alone: seven users are withheld.
    whole = write_interactions(tmp_path / "whole.csv", dict(everybody[:43]))
    data = {"source": str(whole), "items": str(tiny.items)}
    run = tiny_run(method="pfm", data=data, evaluation__baselines=["popularity"])
    train = run.data.split.train.interactions
    assert counts.tolist() == np.bincount(train.items, minlength=30).tolist()
    task = evaluation_task(run, run.as_set(side.model.shared), run.data.split.test, MODES)
    ranks = {mode.value: own for mode, own in measure(run, task).ranks.items()}
    ranks |= rank_baselines(fit_run_baselines(run), task)
    values = {n: metrics.per_user(metrics.ndcg(r.full, 5), r.users)[0] for n, r in ranks.items()}
    by_name = {one.name: one for one in found if one.metric == "ndcg"}
    assert {*values} < {*by_name}
    for name, own in values.items():
        assert by_name[name].value == pytest.approx(own.mean(), abs=1e-9)
        assert (by_name[name].num_users, by_name[name].num_nodes) == (43, 2)
    gain = by_name["shared_only-popularity"]
    differences = values["shared_only"] - values["popularity"]
    assert gain.value == pytest.approx(differences.mean())
    half = 1.959964 * differences.std(ddof=1) / 43**0.5
    assert gain.ci_high - gain.value == pytest.approx(half)
    assert "shared_private-shared_only" in by_name


def test_small_nodes_give_neither_figures_nor_counts(
    tiny: Tiny, one_process: Processes, tmp_path: Path
) -> None:
    assert site_tree(tiny, tmp_path, "n01").get("min_users_per_figure") is None  # 20 by default
    link = LocalLink({"n01": Worker(make_site(tiny, tmp_path, "n01"), one_process)})
    side = side_of(tiny, tmp_path, method="pfm")
    meet(side, link, link.nodes)
    assert count_items(side, link) is None
    request = evaluation_of(side, "validation", MODES, (5,))
    assert evaluate_nodes(side, link, side.model.shared, request) == []


def test_a_node_that_was_restarted_is_measured_and_one_that_takes_no_part_is_named(
    tiny: Tiny, one_process: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither knows the federation: the one takes part again, the other's owner forbids it."""
    everybody = list(random_histories(42, seed=3).items())
    for node, own in (("n01", everybody[:21]), ("n02", everybody[21:])):
        write_interactions(tmp_path / f"{node}.csv", dict(own))
    sites = {
        "n01": make_site(tiny, tmp_path, "n01"),
        "n02": make_site(tiny, tmp_path, "n02", allow={"backbones": []}),
    }
    link = LocalLink({node: Worker(site, one_process) for node, site in sites.items()})
    side = side_of(tiny, tmp_path, method="pfm")
    counts = count_items(side, link)
    assert counts is not None
    assert counts.sum() > 0
    request = evaluation_of(side, "test", (Mode.SHARED_ONLY,), (5,))
    found = evaluate_nodes(side, link, side.model.shared, request)
    assert {(one.num_users, one.num_nodes) for one in found} == {(21, 1)}
    assert "node n02 is in no figure: the node refused the call: not_allowed" in caplog.text


def test_sums_become_a_mean_and_its_interval() -> None:
    """Values 0, 1 at one node and 2, 5 at another: mean 2, variance (4 + 1 + 0 + 9) / 3."""
    replies = [
        EvaluateReply(figures=(Figure(name="m", metric="ndcg", k=5, **sums),))
        for sums in (
            {"total": 1.0, "squares": 1.0, "num_users": 2},
            {"total": 7.0, "squares": 29.0, "num_users": 2},
        )
    ]
    [found] = combine([*replies, EvaluateReply()])
    assert (found.value, found.num_users, found.num_nodes) == (2.0, 4, 2)
    half = 1.959964 * (14 / 3 / 4) ** 0.5
    assert (found.ci_low, found.ci_high) == (pytest.approx(2 - half), pytest.approx(2 + half))
