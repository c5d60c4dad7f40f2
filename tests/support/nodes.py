"""Nodes of the tiny world: its users divided over three sites."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.federating.authority import masks_sections
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.config.text import validated
from pfm_llm.data.sources import load_catalogue
from pfm_llm.federation.members import Answer, Link
from pfm_llm.federation.nodes import NodesOptions, federation_of_nodes
from pfm_llm.federation.rounds import Federation
from pfm_llm.federation.server_side import ServerSide, assemble_server
from pfm_llm.node.link import LocalLink
from pfm_llm.node.site import SiteConfig
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.messages import Message
from pfm_llm.server.checkpoint import CheckpointStore
from tests.support.tiny import Tiny, random_histories, write_interactions

NODES = ("n01", "n02", "n03")


def histories_of(node: str, num_users: int = 24) -> dict[str, list[int]]:
    """The histories of a node's users: every third of the tiny world."""
    everybody = list(random_histories(num_users).items())
    return dict(everybody[NODES.index(node) :: len(NODES)])


def site_tree(tiny: Tiny, folder: Path, node: str, **settings: Any) -> dict[str, Any]:
    """The settings of a site, whose files are in a folder."""
    source = folder / f"{node}.csv"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_interactions(source, histories_of(node))
    return {
        "data": {"source": str(source), "items": str(tiny.items)},
        "folder": str(folder / f"{node}.private"),
        "allow": {"backbones": [str(tiny.model)]},
        "dtype": "float32",
        "threads": 1,
        "min_users_per_sum": 1,
        **settings,
    }


def make_site(tiny: Tiny, folder: Path, node: str, **settings: Any) -> SiteConfig:
    """`site_tree`, validated."""
    return validated(site_tree(tiny, folder, node, **settings), SiteConfig, "site.yaml")


def side_of(tiny: Tiny, folder: Path, **settings: Any) -> ServerSide:
    """The server of the tiny experiment, which has the catalogue alone."""
    config = tiny.config(folder / "runs", data={"source": "/nowhere.csv"}, **settings)
    return assemble_server(config, load_catalogue(str(tiny.items)), torch.device("cpu"))


def federation(
    side: ServerSide,
    link: Link,
    folder: Path,
    processes: Processes,
    options: NodesOptions | None = None,
) -> Federation:
    """The loop over some nodes, with the files of the run in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, log = CheckpointStore(folder / "server"), MetricsLog(folder / "metrics.jsonl")
    return federation_of_nodes(side, link, checkpoints, log, processes, options or NodesOptions())


def shared_of(found: Federation) -> Mapping[str, torch.Tensor]:
    """The shared tensors at a federation's server."""
    return found.server.shared.tensors


class Watched(LocalLink):
    """Notes what passes, and loses the answers that a test wants lost.

    Attributes:
        workers: Name of a node to its worker.
        passed: Call, node, request and answer of all that was asked.
        lost: Call and node whose request never arrives.
        change: Bends an answer.
    """

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        super().__init__(workers)
        self.workers = self._workers
        self.passed: list[tuple[str, str, Message, Answer]] = []
        self.lost: set[tuple[str, str]] = set()
        self.change: Callable[[str, str, Answer], Answer] = lambda call, node, answer: answer

    def ask(self, call: str, requests: Mapping[str, Message]) -> Mapping[str, Answer]:
        arrive = {n: request for n, request in requests.items() if (call, n) not in self.lost}
        answers = super().ask(call, arrive)
        answers = {node: self.change(call, node, answer) for node, answer in answers.items()}
        self.passed += [(call, node, requests[node], answers[node]) for node in answers]
        return answers

    def answers(self, call: str) -> dict[str, Any]:
        """Node to its last answer to a call."""
        return {node: answer for name, node, _, answer in self.passed if name == call}


def users_of(folder: Path) -> dict[str, str]:
    """Slot to client, as the nodes' secret files have it."""
    found = {}
    for node in NODES:
        [path] = (folder / f"{node}.private" / "federations").glob("*/slots.json")
        for slot, client in enumerate(json.loads(path.read_text())):
            found[f"{node}/{slot:05d}"] = client
    return found


def masks_of(folder: Path, nodes: Sequence[str] = NODES) -> dict[str, dict[str, Any]]:
    """Node to its section ``masks``, with the keys of all others; each key is made once."""
    return masks_sections({node: folder / f"{node}.private" for node in nodes})
