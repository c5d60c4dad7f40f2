"""Faults of real processes over Flower: who is killed, stands still, or is another than it was.

One SuperLink with three SuperNodes and workers serves all tests. Each test is a run of all clients
in each round, so that a node that is not in it costs eight of 24.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.federating.authority import make_authority
from benchmarks.federating.lab import Lab, flower_is_installed
from pfm_llm.base.errors import LaunchError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.settings import settings_hash
from pfm_llm.federation.rounds import run_rounds
from pfm_llm.node.client import NodeClient
from pfm_llm.node.link import SocketLink
from pfm_llm.node.site import load_site
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.runs.folders import ENVIRONMENT_FILE, METRICS_FILE
from pfm_llm.server.checkpoint import CheckpointStore
from tests.support.nodes import NODES, federation, side_of, site_tree
from tests.support.scripted_worker import SECRET, beside, write_script
from tests.support.tiny import Tiny, write_items

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not flower_is_installed(), reason="the extra [flower] is not installed"),
]
SETTINGS: dict[str, Any] = {
    "method": "custom",
    "federation__cohort_size": 24,
    "evaluation__splits": ["test"],
}
FIRST, SECOND, THIRD = NODES
WAIT, ANSWER = 300.0, 300.0
MESSAGE_IS_GONE = 3
"""Flower's code for a message whose time to live is over."""


class Scripted(Lab):
    """A lab whose workers follow scripts."""

    def worker(self, node: str, site: Path) -> list[str]:
        return [sys.executable, "-m", "tests.support.scripted_worker", str(site)]


class Cut(Exception):
    """A test has seen enough of a run."""


@dataclass
class World:
    """The lab, and the files of its nodes.

    Attributes:
        tiny: Its model lies in the folder, so that a test may change it.
    """

    tiny: Tiny
    folder: Path
    lab: Lab
    sites: dict[str, Path]

    def config(self, name: str, num_rounds: int, **settings: Any) -> Path:
        """The config of a run with an own folder of runs. All are one federation to the nodes."""
        for kind in ("did", "go", "held"):
            for path in self.folder.glob(f"*.{kind}-*"):
                path.unlink()
        for site in self.sites.values():
            write_script(site)
        whole = {**SETTINGS, "federation__num_rounds": num_rounds, **settings}
        return self.tiny.config_file(
            self.folder / f"{name}.server.yaml", self.folder / name, **whole
        )

    def rounds(self, name: str) -> list[dict[str, Any]]:
        return MetricsLog(self.folder / name / "tiny" / METRICS_FILE).read()

    def has_done(self, node: str, round_number: int) -> bool:
        """Whether a node has dealt with a request to train, and its answer is on its way."""
        if not beside(self.sites[node], f"did-{round_number}").exists():
            return False
        NodeClient(load_site(self.sites[node]).socket_path, timeout=WAIT).call("about")
        return True

    def holds(self, node: str, round_number: int) -> bool:
        """Whether a node has been asked, and waits for `go`."""
        return beside(self.sites[node], f"held-{round_number}").exists()

    def go(self, node: str, round_number: int) -> None:
        """Let a node train that waits."""
        beside(self.sites[node], f"go-{round_number}").touch()

    def finish(self, node: str, round_number: int) -> None:
        """Let a node train whose run is over, and wait until it has."""
        self.go(node, round_number)
        while not self.has_done(node, round_number):
            time.sleep(0.1)

    def replace(self, node: str, **settings: Any) -> None:
        """Kill a worker that may live, and start it with other settings of its site."""
        name = f"{node}.worker"
        self.lab.kill(name)
        write_site(self.tiny, self.folder, node, **settings)
        self.lab.restart(name)
        self.lab.wait_for(name)

    def versions(self, node: str) -> set[tuple[int, ...]]:
        """The rounds of the private states that a node's clients have in the newest federation."""
        paths = (self.folder / f"{node}.private" / "federations").glob("*/asked.json")
        store = PrivateStore(max(paths, key=lambda path: path.stat().st_mtime).parent)
        return {tuple(store.versions(client)) for client in store.client_ids()}

    def text_of_server(self) -> bytes:
        """All that Flower's server has written."""
        paths = [*(self.folder / "flower").glob("state.db*")]
        paths += [self.folder / "superlink.log", self.folder / "run.log"]
        return b"".join(path.read_bytes() for path in paths)


def write_site(tiny: Tiny, folder: Path, node: str, **settings: Any) -> Path:
    socket = {"path": str(folder / f"{node}.d" / "s")}
    tree = site_tree(tiny, folder, node, socket=socket, tokens_per_chunk=1)
    for key, value in settings.items():
        tree[key] = {**tree[key], **value}
    path = folder / f"{node}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def world(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("f")
    shutil.copytree(tiny.model, folder / "model")
    own = replace(tiny, model=folder / "model")
    sites = {node: write_site(own, folder, node) for node in NODES}
    for site in sites.values():
        write_script(site)
    names = [f"{node}.{kind}" for node in NODES for kind in ("worker", "supernode")]
    keys = make_authority(folder / "keys", NODES)
    with Scripted(folder, keys, sites, may_end=names) as lab:
        yield World(own, folder, lab, sites)


class Steps:
    """What a test does while a run goes on: each step once, as soon as its condition holds.

    Args:
        steps: Condition and act, in order.
    """

    def __init__(self, *steps: tuple[Callable[[], bool], Callable[[], None]]) -> None:
        self.left = list(steps)

    def __call__(self) -> None:
        while self.left and self.left[0][0]():
            self.left.pop(0)[1]()


def cut() -> None:
    raise Cut


def of_record(record: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Clients of a round, and the reasons of those that were refused."""
    assert record["refused"] == sum(record.get("refused_by_reason", {}).values())
    return record["num_clients"], record.get("refused_by_reason", {})


def test_what_befalls_nodes_costs_their_clients_of_that_round(world: World) -> None:
    """Killed, failing, full, and other than they were: each has its code, and others go on."""
    config = world.config("nodes", 7, output__checkpoint_every=1)
    write_script(world.sites[FIRST], r2="hold", r4="hold", r6="hold", r7="hold")
    write_script(world.sites[SECOND], r2="fail", r3="full")
    write_script(world.sites[THIRD], r2="die")

    def both(round_number: int) -> Callable[[], bool]:
        return lambda: all(world.has_done(node, round_number) for node in (SECOND, THIRD))

    def third_is_back() -> None:
        write_script(world.sites[THIRD])
        world.lab.restart(f"{THIRD}.worker")
        world.lab.wait_for(f"{THIRD}.worker")
        assert world.versions(THIRD) == {(1, 2)}
        world.go(FIRST, 2)

    titles = [f"Other title {number}" for number in range(30)]
    items = write_items(world.folder / "other_items.csv", titles)
    weights = world.tiny.model / "model.safetensors"
    before = weights.read_bytes()

    def other_catalogue_and_base() -> None:
        world.replace(SECOND, data={"items": str(items)})
        bent = {n: t * 1.01 for n, t in load_file(weights).items()}
        swap(weights, lambda path: save_file(bent, path, metadata={"format": "pt"}))
        world.replace(THIRD)
        world.go(FIRST, 4)

    def other_window_and_contract() -> None:
        swap(weights, lambda path: path.write_bytes(before))
        wanted = settings_hash(world.tiny.config(world.folder, **SETTINGS, window__items=5))
        world.replace(SECOND, allow={"settings": [wanted]})
        write_script(world.sites[THIRD], old="old")
        world.replace(THIRD)
        world.go(FIRST, 6)

    def as_before() -> None:
        write_script(world.sites[THIRD])
        world.replace(SECOND)
        world.replace(THIRD)
        world.go(FIRST, 7)

    steps = Steps(
        (lambda: not world.lab.is_alive(f"{THIRD}.worker"), lambda: None),
        (lambda: world.has_done(SECOND, 2), third_is_back),
        (both(4), other_catalogue_and_base),
        (both(6), other_window_and_contract),
        (both(7), as_before),
    )
    world.lab.run(config, steps, ANSWER, quorum=0.3)
    found = [of_record(record) for record in world.rounds("nodes")]
    assert found == [
        (24, {}),
        (24, {NodeRefusal.FAILED: 8, "no_answer": 8}),
        (24, {NodeRefusal.STORAGE: 8}),
        (24, {}),
        (24, {NodeRefusal.AGREEMENT: 16}),
        (24, {NodeRefusal.AGREEMENT: 8, NodeRefusal.NOT_ALLOWED: 8}),
        (24, {}),
    ]
    assert {versions[-1] for node in NODES for versions in world.versions(node)} == {7}
    written = world.text_of_server()
    for text in (SECRET, str(world.folder / f"{SECOND}.private"), "ZeroDivisionError"):
        assert text.encode() not in written
    assert SECRET in (world.folder / f"{SECOND}.worker.log").read_text()


def swap(path: Path, write: Callable[[Path], object]) -> None:
    """Put another file in a file's place; who has the old one open keeps it."""
    write(path.with_name("new"))
    path.with_name("new").replace(path)


def test_who_stands_still_is_left_out_at_the_deadline_and_takes_part_again(world: World) -> None:
    config = world.config("deadline", 3)
    write_script(world.sites[THIRD], r2="stop")
    name = f"{THIRD}.worker"

    def go_on() -> None:
        os.kill(world.lab.pid(name), signal.SIGCONT)

    steps = Steps((lambda: len(world.rounds("deadline")) == 2, go_on))
    try:
        world.lab.run(config, steps, 60.0)
    finally:
        go_on()
    found = [of_record(record) for record in world.rounds("deadline")]
    assert found == [(24, {}), (24, {"no_answer": 8}), (24, {})]
    # The message lives as long as the deadline; Flower may say first that it is no more.
    late = rf"node {THIRD}: (no answer in 60 s|Flower's error code {MESSAGE_IS_GONE})"
    assert re.search(late, (world.folder / "run.log").read_text())


def test_a_run_whose_superlink_was_killed_goes_on_from_its_commit_with_the_same_losses(
    world: World, one_process: Processes
) -> None:
    """The nodes have private states of a round that was not committed: they are discarded."""
    settings = {"output__checkpoint_every": 2}
    config = world.config("cut", 4, **settings)
    side = side_of(world.tiny, world.folder, **SETTINGS, federation__num_rounds=4, **settings)
    sockets = {n: NodeClient(load_site(site).socket_path) for n, site in world.sites.items()}
    whole = federation(side, SocketLink(sockets), world.folder / "whole", one_process)
    run_rounds(whole, 1, lambda: {})

    def kill() -> None:
        assert {versions[-1] for versions in world.versions(FIRST)} == {3}
        world.lab.kill("superlink")
        raise Cut

    write_script(world.sites[FIRST], r4="hold")
    with pytest.raises(Cut):
        world.lab.run(config, Steps((lambda: len(world.rounds("cut")) == 3, kill)), ANSWER)
    world.finish(FIRST, 4)
    world.lab.restart("superlink")
    world.lab.wait_for("superlink")
    world.lab.wait_for_server_apps()
    world.lab.run(config, lambda: None, ANSWER, resume=True)
    assert "resuming after round 2" in (world.folder / "run.log").read_text()
    losses = [record["loss"] for record in world.rounds("cut")]
    assert losses == [record["loss"] for record in whole.metrics_log.read()]
    found = CheckpointStore(world.folder / "cut" / "tiny.private" / "server").load()
    assert found is not None
    expected = whole.server.state_tensors()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_a_node_that_is_missing_keeps_its_place_and_none_begins_a_run_without_it(
    world: World,
) -> None:
    """A SuperNode is killed within a round; the run goes on without it, and later with it."""
    name = f"{THIRD}.supernode"
    config = world.config("missing", 4, output__checkpoint_every=1)
    write_script(world.sites[FIRST], r3="hold")
    write_script(world.sites[THIRD], r2="hold")

    def kill() -> None:
        world.lab.kill(name)

    steps = Steps(
        (lambda: world.holds(THIRD, 2), kill),
        (lambda: world.holds(FIRST, 3), cut),
    )
    with pytest.raises(Cut):
        world.lab.run(config, steps, ANSWER)
    world.lab.end_runs()
    world.finish(FIRST, 3)
    world.finish(THIRD, 2)

    other = world.config("begun", 1)
    with pytest.raises(LaunchError):
        world.lab.run(other, lambda: None, ANSWER, wait=1.0)
    assert f"{THIRD} cannot take part" in (world.folder / "run.log").read_text()

    config = world.config("missing", 4, output__checkpoint_every=1)
    write_script(world.sites[FIRST], r3="hold")

    def back() -> None:
        until = time.monotonic() + WAIT
        while world.lab.num_online() < 3 and time.monotonic() < until:
            if not world.lab.is_alive(name):  # Flower takes the key for in use for some time
                world.lab.restart(name)
            time.sleep(5)
        world.go(FIRST, 3)

    steps = Steps((lambda: world.holds(FIRST, 3), back))
    world.lab.run(config, steps, ANSWER, resume=True, wait=1.0)
    found = [of_record(record) for record in world.rounds("missing")]
    lost = (24, {"no_answer": 8})
    assert found == [(24, {}), lost, lost, (24, {})]
    run = world.folder / "missing" / "tiny"
    environment = json.loads((run / ENVIRONMENT_FILE).read_text())
    assert environment["nodes"] == dict.fromkeys(NODES, 8)
