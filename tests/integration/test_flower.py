"""Flower with real processes: TLS, node authentication, three workers, and runs of two rounds."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.federating.agreement import difference
from benchmarks.federating.authority import make_authority
from benchmarks.federating.lab import Lab, flower_is_installed
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.federation.nodes import slots_of
from pfm_llm.node.masking import KEY_FILE
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.publish.signing import load_key
from pfm_llm.runs.folders import METRICS_FILE
from pfm_llm.runs.run import Run
from pfm_llm.server.aggregation import WeightedMean
from pfm_llm.server.checkpoint import CheckpointStore
from pfm_llm.server.server import Server
from tests.conftest import TinyRun
from tests.support.nodes import (
    NODES,
    masks_of,
    side_of,
    site_tree,
    users_of,
)
from tests.support.tiny import Tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not flower_is_installed(), reason="the extra [flower] is not installed"),
]
STRANGER = "n04"
"""It has a key that nobody has registered."""
STATES = ("shared/", "first/")
SETTINGS = {
    "method": "pfm",
    "federation__cohort_size": 9,
    "federation__num_rounds": 2,
    "output__checkpoint_every": 1,
}


MASKED = {
    **SETTINGS,
    "federation__stages": [{"clip": {"norm": 4.0}}],
    "federation__server__optimizer": "average",
    "federation__masks": True,
}
SLOTS = slots_of(dict.fromkeys(NODES, 8))
DYING = "n03"


class OneDies(Lab):
    """A lab in which a worker is killed when it is asked for its sum."""

    def worker(self, node: str, site: Path) -> list[str]:
        if node == DYING:
            return [sys.executable, "-m", "tests.support.dying_worker", str(site)]
        return super().worker(node, site)


def key_of(folder: Path, node: str) -> Path:
    return folder / f"{node}.private" / KEY_FILE


def write_sites(tiny: Tiny, folder: Path, masks: Mapping[str, Any]) -> dict[str, Path]:
    """A ``site.yaml`` for each node; a client a chunk, as in the process to compare with."""
    sites = {}
    for node in NODES:
        more = {"masks": masks[node]} if masks else {}
        socket = {"path": str(folder / f"{node}.d" / "s")}
        tree = site_tree(tiny, folder, node, socket=socket, tokens_per_chunk=1, **more)
        sites[node] = folder / f"{node}.yaml"
        sites[node].write_text(yaml.safe_dump(tree))
    return sites


def is_refused(words: list[str], variables: Mapping[str, str], folder: Path) -> bool:
    """Whether the SuperLink refuses the key of a SuperNode, which then goes on without it."""
    with (folder / "stranger.log").open("wb") as log:
        process = psutil.Popen(words, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if re.search(r'/activate-node \S+" 4\d\d', (folder / "superlink.log").read_text()):
                return True
            time.sleep(0.2)
        return False
    finally:
        for one in [*process.children(recursive=True), process]:
            one.kill()
        process.wait()


def test_two_rounds_over_flower_are_those_of_one_process(
    tiny: Tiny, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("f")
    sites = write_sites(tiny, folder, {})
    config = tiny.config_file(
        folder / "server.yaml",
        folder / "runs",
        data={"items": str(tiny.items)},
        evaluation__splits=["test"],
        **SETTINGS,
    )
    keys = make_authority(folder / "keys", (*NODES, STRANGER))
    with Lab(folder, keys, sites) as lab:
        assert is_refused(lab.supernode(STRANGER, folder / "s"), lab.variables, folder)
        lab.run(config, lambda: None, 600.0)
        started = json.loads((folder / "pids.json").read_text())
    assert started.keys() >= {"superlink", *(f"{node}.worker" for node in NODES)}
    assert not any(psutil.pid_exists(pid) for pid in started.values())
    for log in (
        "superlink.log",
        "run.log",
    ):  # what the server's side writes names no file of a node
        assert not any(f"{node}.private" in (folder / log).read_text() for node in NODES)
    run = folder / "runs" / "tiny"
    assert rounds_of(run) == [(1, 3, 0), (2, 3, 0)]
    assert read_artefact(run / "shared_adapter").manifest.round == 2
    whole = tiny_run(**SETTINGS, runtime__tokens_per_chunk=1)
    server = side_of(tiny, folder, **SETTINGS).new_server(SLOTS, whole.config)
    assert difference_from_one_process(run, whole, server, NODES)[0] <= 1e-6


def test_a_node_that_is_killed_once_it_has_shared_drops_out_of_rounds_under_masks(
    tiny: Tiny, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("f")
    masks = masks_of(folder)
    sites = write_sites(tiny, folder, masks)
    config = tiny.config_file(
        folder / "server.yaml",
        folder / "runs",
        data={"items": str(tiny.items)},
        evaluation__splits=["test"],
        **MASKED,
    )
    keys = make_authority(folder / "keys", NODES)
    with OneDies(folder, keys, sites, may_end=[f"{DYING}.worker"]) as lab:
        lab.run(config, lambda: None, 600.0)
    run = folder / "runs" / "tiny"
    [first, second] = rounds_of(run)
    assert (first, second) == ((1, 2, first[2]), (2, 2, second[2]))
    left = [node for node in NODES if node != DYING]
    whole = tiny_run(**{**MASKED, "federation__masks": False}, runtime__tokens_per_chunk=1)
    server = side_of(tiny, folder, **MASKED).new_server(SLOTS, whole.config)
    lost = [
        sum(slot.startswith(f"{DYING}/") for slot in server.select_cohort(number))
        for number in (1, 2)
    ]
    assert [first[2], second[2]] == lost
    assert all(lost)
    apart, moved = difference_from_one_process(run, whole, server, left)
    assert apart <= 1e-3 * moved  # the step of the fixed point, beside what two rounds change
    for log in ("superlink.log", "run.log"):
        text = (folder / log).read_text()
        assert not any(load_key(key_of(folder, n)).private_bytes_raw().hex() in text for n in NODES)


def rounds_of(run: Path) -> list[tuple[int, int, int]]:
    """Number, nodes and refused clients of each round."""
    records = MetricsLog(run / METRICS_FILE).read()
    return [(one["round"], one["nodes"], one["refused"]) for one in records]


def difference_from_one_process(
    run: Path, whole: Run, server: Server, nodes: Sequence[str]
) -> tuple[float, float]:
    """How far a run's state is from that of one process with some nodes' clients, and it moved."""
    start = server.state_tensors()
    users = users_of(run.parents[1])
    slots = {client: slot for slot, client in users.items()}
    for round_number in (1, 2):
        total, cohort = WeightedMean(), server.select_cohort(round_number)
        asked = [users[slot] for slot in cohort if slot.split("/")[0] in nodes]
        trainer = whole.clients.trainer
        for chunk in trainer.chunks(asked):
            for update in trainer.train_chunk(chunk, server.broadcast):
                server.receive(total, replace(update, client_id=slots[update.client_id]))
        assert server.aggregate(total).num_clipped == 0
    found = CheckpointStore(run.with_name("tiny.private") / "server").load()
    assert found is not None
    expected = {n: t for n, t in server.state_tensors().items() if n.startswith(STATES)}
    own = {n: t for n, t in found.tensors.items() if n.startswith(STATES)}
    return difference(own, expected), difference({n: start[n] for n in expected}, expected)
