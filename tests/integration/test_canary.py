"""Canaries at the nodes: none is in what leaves them over their sockets, answers and refusals."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import NodeRefused
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.federation.rounds import run_rounds
from pfm_llm.node.client import NodeClient
from pfm_llm.node.link import SocketLink
from pfm_llm.node.serve import Stop, serve
from pfm_llm.node.site import SiteConfig
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.messages import AboutRequest, encode
from tests.support.canary import TITLE, USER, plant
from tests.support.leaks import files_below
from tests.support.nodes import NODES, federation, make_site, masks_of, side_of
from tests.support.tap import Tap
from tests.support.tiny import Tiny

pytestmark = pytest.mark.slow
SETTINGS = {
    "method": "custom",
    "federation__cohort_size": 12,
    "federation__num_rounds": 2,
    "output__checkpoint_every": 1,
}
MASKED = {
    **SETTINGS,
    "federation__stages": [{"clip": {"norm": 4.0}}],
    "federation__masks": True,
}


@contextlib.contextmanager
def tapped(worker: Worker, site: SiteConfig, tap_at: Path) -> Iterator[Tap]:
    """A worker that serves its socket in a thread, and a tap before the socket."""
    stop, path = Stop(), site.socket_path
    thread = threading.Thread(target=serve, args=(worker, site, stop))
    thread.start()
    try:
        while not path.exists():
            assert thread.is_alive()
            time.sleep(0.02)
        with Tap.on_socket(tap_at, path) as tap:
            yield tap
    finally:
        stop.set()
        thread.join(60)


def left(taps: Mapping[str, Tap]) -> dict[str, bytes]:
    """All that has left each node."""
    return {node: b"".join(map(bytes, tap.from_server)) for node, tap in taps.items()}


@pytest.mark.parametrize("settings", [SETTINGS, MASKED], ids=["clear", "masks"])
def test_no_canary_leaves_a_node(
    tiny: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
    one_process: Processes,
    settings: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("c")
    world, canaries = plant(tiny, folder, NODES)
    masks = masks_of(folder) if settings is MASKED else {}
    with contextlib.ExitStack() as stack:
        taps, stores = {}, {}
        for node in NODES:
            more = {"masks": masks[node]} if masks else {}
            socket = {"path": str(folder / f"{node}.d" / "s")}
            site = make_site(world, folder, node, socket=socket, **more)
            tap = tapped(Worker(site, one_process), site, folder / f"{node}.t")
            taps[node] = stack.enter_context(tap)
            stores[node] = folder / f"{node}.private" / "federations"
        clients = {node: NodeClient(folder / f"{node}.t", timeout=300) for node in NODES}
        link = SocketLink(clients)
        found = federation(side_of(world, folder, **settings), link, folder / "run", one_process)

        def search(round_number: int) -> None:
            for node, parent in stores.items():
                [own] = parent.iterdir()
                assert canaries.learn_store(node, PrivateStore(own))

        run_rounds(found, 1, lambda: {}, search)
        sent = left(taps)
    assert found.server.shared.round_number == 2
    assert [one["refused"] for one in found.metrics_log.read()] == [0, 0]
    assert all(len(raw) > 10_000 for raw in sent.values())
    assert canaries.search(sent) == {}
    assert canaries.search(files_below(folder / "run")) == {}
    # What is looked for is there, and the search finds it where it belongs.
    for node in NODES:
        kept = canaries.search(files_below(folder / f"{node}.private"))
        labels = set().union(*kept.values())
        assert "user id" in labels
        assert any(label.startswith(f"{node}/") for label in labels)


def test_no_refusal_holds_a_canary(
    tiny: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
    one_process: Processes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path_factory.mktemp("c")
    world, canaries = plant(tiny, folder, NODES)
    source = folder / "n01.csv"
    rows = [f"{USER},i0,soon,{TITLE}" for _ in range(3)]
    source.write_text("\n".join(["user_id,item_id,timestamp,title", *rows, ""]))
    socket = {"path": str(folder / "n01.d" / "s")}
    site = make_site(world, folder, "n01", socket=socket)
    worker, client = Worker(site, one_process), NodeClient(folder / "n01.t", timeout=300)
    codes = []
    with tapped(worker, site, folder / "n01.t") as tap, caplog.at_level("WARNING"):

        def refuse(call: str, header: bytes, body: bytes = b"") -> None:
            with pytest.raises(NodeRefused) as raised:
                client.call(call, header, body)
            codes.append(str(raised.value.code))

        refuse("about", *encode(side_of(world, folder, **SETTINGS).invitation))
        refuse("train", b"{}")
        refuse("forget", b'{"user": ""}')
        refuse("read", b'{"path": "n01.csv"}')

        def fail(*_: object) -> None:
            raise ZeroDivisionError(f"user {USER} likes {TITLE}, see {source}")

        monkeypatch.setattr(worker, "about", fail)
        refuse("about", *encode(AboutRequest()))
        sent = left({"n01": tap})
    assert codes == ["data", "malformed", "malformed", "unknown_call", "failed"]
    assert canaries.search(sent) == {}
    said = canaries.search({"log": caplog.text.encode()})
    assert said["log"] >= {"user id", "title", "path of interactions"}
