"""Flower with real processes: TLS, node authentication, three workers, and a run of two rounds."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.federating.agreement import difference
from benchmarks.federating.authority import make_authority
from benchmarks.federating.lab import Lab, flower_is_installed
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.federation.nodes import slots_of
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.runs.folders import METRICS_FILE
from pfm_llm.server.checkpoint import CheckpointStore
from tests.conftest import TinyRun
from tests.support.nodes import (
    NODES,
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


def write_sites(tiny: Tiny, folder: Path) -> dict[str, Path]:
    """A ``site.yaml`` for each node; a client a chunk, as in the process to compare with."""
    sites = {}
    for node in NODES:
        socket = {"path": str(folder / f"{node}.d" / "s")}
        tree = site_tree(tiny, folder, node, socket=socket, tokens_per_chunk=1)
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
    sites = write_sites(tiny, folder)
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
    records = MetricsLog(run / METRICS_FILE).read()
    assert [(one["round"], one["nodes"], one["refused"]) for one in records] == [
        (1, 3, 0),
        (2, 3, 0),
    ]
    assert read_artefact(run / "shared_adapter").manifest.round == 2

    users, whole = users_of(folder), tiny_run(**SETTINGS, runtime__tokens_per_chunk=1)
    side = side_of(tiny, folder, **SETTINGS)
    server = side.new_server(slots_of(dict.fromkeys(NODES, 8)), whole.config)
    slots = {client: slot for slot, client in users.items()}
    for round_number in (1, 2):
        total, cohort = server.new_aggregator(), server.select_cohort(round_number)
        trainer = whole.clients.trainer
        for chunk in trainer.chunks([users[slot] for slot in cohort]):
            for update in trainer.train_chunk(chunk, server.broadcast):
                server.receive(total, replace(update, client_id=slots[update.client_id]))
        assert server.aggregate(total).num_clipped == 0
    found = CheckpointStore(run.with_name("tiny.private") / "server").load()
    assert found is not None
    expected = {n: t for n, t in server.state_tensors().items() if n.startswith(STATES)}
    own = {n: t for n, t in found.tensors.items() if n.startswith(STATES)}
    assert difference(own, expected) <= 1e-6
