"""Rounds with three nodes are the rounds of one process that has all data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.federating.agreement import difference, in_one_process
from pfm_llm.base.processes import Processes
from pfm_llm.federation.rounds import resume_from, run_rounds
from pfm_llm.node.link import LocalLink
from pfm_llm.node.worker import Worker
from tests.conftest import TinyRun
from tests.support.nodes import (
    NODES,
    federation,
    make_site,
    shared_of,
    side_of,
    users_of,
)
from tests.support.tiny import Tiny


def workers(tiny: Tiny, folder: Path, processes: Processes, **site: Any) -> dict[str, Worker]:
    return {n: Worker(make_site(tiny, folder, n, **site), processes) for n in NODES}


ALONE = {"tokens_per_chunk": 1}  # a client a chunk: the same products in one process and in three


SETTINGS: list[dict[str, Any]] = [
    {"method": "pfm"},
    {
        "method": "pfm",
        "federation__server__weighting": "num_examples",
        "head__dropout": 0.3,
        "federation__stages": [{"clip": {"norm": 0.05}}],
    },
    {"method": "custom", "federation__server__optimizer": "average"},
    {"method": "custom", "adapters__private__kind": "shared_basis"},
    {"method": "pfm", "head__item_ids": "codes", "head__codes": {"text_size": 4, "hash_size": 16}},
]
NAMES = ["pfm", "weights, dropout, clip", "average, private LoRA", "shared basis", "codes"]


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_the_sums_of_three_nodes_are_the_round_of_one_process(
    tiny: Tiny,
    tiny_run: TinyRun,
    one_process: Processes,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    settings = {"federation__cohort_size": 9, **settings}
    link = LocalLink(workers(tiny, tmp_path, one_process, **ALONE))
    found = federation(side_of(tiny, tmp_path, **settings), link, tmp_path / "run", one_process)
    users = users_of(tmp_path)
    assert len(users) == 24
    run = tiny_run(**settings, runtime__tokens_per_chunk=1)
    for round_number in (1, 2, 3):
        cohort, shared = found.server.select_cohort(round_number), found.server.broadcast
        summed = found.exchange.train(cohort, shared)
        whole = in_one_process(run, [users[slot] for slot in cohort], shared)
        assert summed.tally.num_updates == whole.tally.num_updates == 9
        assert summed.tally.num_examples == whole.tally.num_examples
        assert summed.tally.loss == pytest.approx(whole.tally.loss, rel=1e-6)
        own, other = summed.result(), whole.result()
        assert difference(own, other) <= 1e-6
        # Two models of one process may round differently, and small tensors are sums that cancel.
        assert all(difference({n: own[n]}, {n: t}) <= 1e-3 for n, t in other.items() if t.any())
        found.server.aggregate(summed)


def test_the_loop_runs_on_nodes_and_resumes_with_their_population(
    tiny: Tiny, one_process: Processes, tmp_path: Path
) -> None:
    settings = {"method": "custom", "federation__cohort_size": 9, "federation__num_rounds": 4}
    side, run = side_of(tiny, tmp_path, **settings), tmp_path / "run"
    nodes = workers(tiny, tmp_path, one_process)
    whole = federation(side, LocalLink(nodes), run, one_process)
    run_rounds(whole, 1, lambda: {})
    assert whole.checkpoints.rounds() == (2, 4)
    [first, *_] = records = whole.metrics_log.read()
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert (first["num_clients"], first["refused"], first["nodes"]) == (9, 0, 3)
    assert first["bytes_up"] == first["bytes_down"] == 3 * side.model.table.num_bytes

    assert difference(shared_of(whole), side.model.shared.tensors) > 1e-3

    # After a crash in round 4 the nodes hold states of it; another node is not asked any more.
    again = federation(side, LocalLink({**nodes, "n04": nodes["n01"]}), run, one_process)
    assert again.environment.population == {"n01": 8, "n02": 8, "n03": 8}
    assert again.environment == whole.environment
    assert resume_from(again, 2) == 3
    run_rounds(again, 3, lambda: {})
    ends = again.server.state_tensors(), whole.server.state_tensors()
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
