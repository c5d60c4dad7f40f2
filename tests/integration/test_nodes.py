"""Three workers as processes of their own: rounds over their sockets, and who is killed.

The workers serve all tests; one that has ended is started again.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.federating.agreement import difference, in_one_process
from pfm_llm.base.errors import NodeError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.federation.nodes import slot_id
from pfm_llm.federation.rounds import Federation, run_rounds
from pfm_llm.node.client import NodeClient
from pfm_llm.node.link import SocketLink
from pfm_llm.protocol.types import SharedState
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.runs.folders import METRICS_FILE
from tests.conftest import TinyRun
from tests.support.nodes import NODES, federation, side_of, site_tree
from tests.support.privacy import count_in_place_of_epsilon
from tests.support.tiny import Tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class NodeProcess:
    """``pfm node serve`` of one site."""

    def __init__(self, tiny: Tiny, folder: Path, node: str) -> None:
        # Paths of sockets are short, and pytest's folders are not.
        self.socket = folder / f"{node}.d" / "s"
        self.private = folder / f"{node}.private"
        self.log = folder / f"{node}.log"
        self._site = folder / f"{node}.yaml"
        tree = site_tree(tiny, folder, node, socket={"path": str(self.socket)})
        self._site.write_text(yaml.safe_dump(tree))
        self.client = NodeClient(self.socket, timeout=300)
        self.start()

    def start(self) -> None:
        """Start the process; `wait` until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pfm_llm.cli", "node", "serve", str(self._site)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def wait(self) -> None:
        for _ in range(3000):  # a busy machine takes minutes to import torch
            with contextlib.suppress(NodeError):
                self.client.call("about")
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)

    @property
    def newest(self) -> Path:
        """The folder of the newest federation."""
        paths = (self.private / "federations").glob("*/slots.json")
        return max(paths, key=lambda path: path.stat().st_mtime).parent

    @property
    def store(self) -> PrivateStore:
        return PrivateStore(self.newest)

    def users(self, name: str) -> dict[str, str]:
        """Slot to client, which only the node knows."""
        clients = json.loads((self.newest / "slots.json").read_text())
        return {slot_id(name, number): client for number, client in enumerate(clients)}


@pytest.fixture(scope="module")
def processes(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, NodeProcess]]:
    folder = tmp_path_factory.mktemp("k")
    found: dict[str, NodeProcess] = {}
    try:
        for node in NODES:
            found[node] = NodeProcess(tiny, folder, node)
        yield found
    finally:
        for one in found.values():
            if one.process.poll() is None:
                one.end(signal.SIGKILL)


@pytest.fixture
def nodes(processes: dict[str, NodeProcess]) -> dict[str, NodeProcess]:
    for node in processes.values():
        if node.process.poll() is not None:
            node.start()
    for node in processes.values():
        node.wait()
    return processes


def begun(
    tiny: Tiny,
    nodes: dict[str, NodeProcess],
    folder: Path,
    processes: Processes,
    settings: dict[str, Any],
) -> Federation:
    """The loop over the nodes' sockets."""
    side = side_of(tiny, folder, **settings)
    link = SocketLink({name: node.client for name, node in nodes.items()})
    return federation(side, link, folder / "run", processes)


def test_a_killed_node_costs_its_clients_of_that_round_and_keeps_their_private_parts(
    tiny: Tiny, nodes: dict[str, NodeProcess], tmp_path: Path, one_process: Processes
) -> None:
    settings = {
        "method": "custom",
        "federation__cohort_size": 24,
        "federation__num_rounds": 3,
        "output__checkpoint_every": 1,
    }
    found = begun(tiny, nodes, tmp_path, one_process, settings)
    killed = nodes["n02"]

    def between_rounds(round_number: int) -> None:
        if round_number == 1:
            assert killed.end(signal.SIGKILL) == -signal.SIGKILL
        if round_number == 2:
            killed.start()
            killed.wait()
            kept = killed.store
            assert [kept.versions(client) for client in kept.client_ids()] == [(1,)] * 8

    run_rounds(found, 1, lambda: {}, between_rounds)
    records = found.metrics_log.read()
    assert [record["nodes"] for record in records] == [3, 2, 3]
    assert [record["refused"] for record in records] == [0, 8, 0]
    assert records[1]["refused_by_reason"] == {"no_answer": 8}
    versions = {
        n: {x.store.versions(c)[-1] for c in x.store.client_ids()} for n, x in nodes.items()
    }
    assert versions == {"n01": {3}, "n02": {3}, "n03": {3}}
    for node in nodes.values():
        assert node.end(signal.SIGTERM) == 0, node.log.read_text()
        assert not node.socket.exists()
        assert "stopped; private states are in" in node.log.read_text()


def node_run(words: list[str], output: Path) -> subprocess.Popen[bytes]:
    """``pfm node run`` as a process, which writes to a file."""
    with output.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pfm_llm.cli", "node", "run", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def test_a_run_from_the_command_line_is_killed_and_resumed(
    tiny: Tiny, nodes: dict[str, NodeProcess], tmp_path: Path
) -> None:
    settings = {"federation__cohort_size": 9, "federation__num_rounds": 60}
    more = {"method": "pfm", "output__checkpoint_every": 1, "evaluation__splits": ["test"]}
    config = tiny.config_file(tmp_path / "server.yaml", tmp_path / "runs", **settings, **more)
    words = [str(config), *(f"{name}={node.socket}" for name, node in nodes.items())]
    run, output = tmp_path / "runs" / "tiny", tmp_path / "output.log"
    log = MetricsLog(run / METRICS_FILE)
    process = node_run(words, output)
    try:
        while len(log.read()) < 2:
            assert process.poll() is None, output.read_text()
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    done = len(log.read())
    assert done < 60
    assert node_run([*words, "--resume"], output).wait() == 0, output.read_text()
    assert [record["round"] for record in log.read()] == [*range(1, 61)]
    assert {record["refused"] for record in log.read()} == {0}
    assert read_artefact(run / "shared_adapter").manifest.round == 60
    text = output.read_text()
    assert "federated rounds: 60/60" in text
    assert "every node has too few users" in text
    assert str(run) in text


def test_a_private_run_over_nodes_is_that_of_one_process_and_is_paid_for(
    tiny: Tiny,
    tiny_run: TinyRun,
    nodes: dict[str, NodeProcess],
    tmp_path: Path,
    one_process: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each node clips its users; the server divides the sum of all and adds noise, here little."""
    count_in_place_of_epsilon(monkeypatch)
    settings = {
        "method": "pfm",
        "head__item_met": False,
        "federation__cohort_size": 9,
        "federation__num_rounds": 3,
        "federation__stages": [{"clip": {"norm": 0.05}}],
        "federation__privacy": {"noise_multiplier": 1e-7, "delta": 1e-5},
        "federation__server__optimizer": "average",
        "federation__server__lr_scale": 1.0,
        "federation__server__warmup_rounds": 0,
        "output__checkpoint_every": 1,
    }
    found = begun(tiny, nodes, tmp_path, one_process, settings)
    states = [dict(found.server.shared.tensors)]
    run_rounds(found, 1, lambda: {}, lambda _: states.append(dict(found.server.shared.tensors)))
    records = found.metrics_log.read()
    assert [(record["num_clients"], record["refused"]) for record in records] == [(9, 0)] * 3
    # Of 24 users in nines each is in two of three rounds at most.
    assert records[-1]["privacy"] == {"epsilon": 2, "delta": 1e-5, "releases": 3}

    users = {slot: who for name, node in nodes.items() for slot, who in node.users(name).items()}
    cohort = [users[slot] for slot in found.server.select_cohort(3)]
    whole = in_one_process(tiny_run(**settings), cohort, SharedState(states[2], 2))
    rate = records[-1]["lr_factor"]
    expected = {name: rate * tensor / 9 for name, tensor in whole.summed().items()}
    moved = {name: states[3][name] - states[2][name] for name in expected}
    assert difference(moved, expected) <= 1e-4
