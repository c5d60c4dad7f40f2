"""Three workers as processes of their own: rounds over their sockets, and one of them killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pfm_llm.base.errors import NodeError
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.federation.nodes import NodesOptions
from pfm_llm.federation.rounds import run_rounds
from pfm_llm.node.client import NodeClient
from pfm_llm.node.link import SocketLink
from tests.support.nodes import NODES, federation, side_of, site_tree
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
    def store(self) -> PrivateStore:
        [folder] = (self.private / "federations").iterdir()
        return PrivateStore(folder)


@pytest.fixture
def nodes(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, NodeProcess]]:
    folder = tmp_path_factory.mktemp("k")
    found: dict[str, NodeProcess] = {}
    try:
        for node in NODES:
            found[node] = NodeProcess(tiny, folder, node)
        for process in found.values():
            process.wait()
        yield found
    finally:
        for node in found.values():
            if node.process.poll() is None:
                node.end(signal.SIGKILL)


def test_a_killed_node_costs_its_clients_of_that_round_and_keeps_their_private_parts(
    tiny: Tiny, nodes: dict[str, NodeProcess], tmp_path: Path, one_process: Processes
) -> None:
    settings = {
        "method": "custom",
        "federation__cohort_size": 24,
        "federation__num_rounds": 3,
        "output__checkpoint_every": 1,
    }
    side = side_of(tiny, tmp_path, **settings)
    link = SocketLink({name: node.client for name, node in nodes.items()})
    found = federation(side, link, tmp_path / "run", one_process, NodesOptions(quorum=0.5))
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
