"""Canaries at the nodes, on Flower: none is in what its server's side keeps, writes or receives."""

import contextlib
import socket
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.federating.authority import Authority, make_authority
from benchmarks.federating.lab import Lab, flower_is_installed
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.runs.folders import METRICS_FILE
from tests.support.canary import plant
from tests.support.leaks import files_below
from tests.support.nodes import NODES, masks_of, site_tree
from tests.support.scripted_worker import SECRET, write_script
from tests.support.tap import Tap
from tests.support.tiny import Tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not flower_is_installed(), reason="the extra [flower] is not installed"),
]
SETTINGS = {
    "method": "custom",
    "federation__cohort_size": 9,
    "federation__num_rounds": 2,
    "federation__stages": [{"clip": {"norm": 4.0}}],
    "output__checkpoint_every": 1,
}
DATABASE, BLOCK = "state.db", 4096
ANSWERED = b'"num_clients"'
"""In the header of a node's answer."""


class OpenLab(Lab):
    """A lab whose messages are read: a tap ends TLS between SuperNodes and SuperLink.

    Attributes:
        tap: The tap.
        stored: Blocks that were in the SuperLink's database at any time, in the order in which they
            came; it deletes what was delivered.
    """

    def __init__(
        self, folder: Path, keys: Authority, sites: dict[str, Path], scripted: bool = False
    ) -> None:
        super().__init__(folder, keys, sites)
        self._scripted = scripted
        self.folder, self.stored = folder, dict[bytes, None]()
        listener = socket.create_server(("127.0.0.1", 0))
        self._tap_port = listener.getsockname()[1]
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(keys.certificate, keys.key)
        own.set_alpn_protocols(["h2", "http/1.1"])
        theirs = ssl.create_default_context(cafile=str(keys.root))

        def upstream(protocol: str | None) -> socket.socket:
            theirs.set_alpn_protocols([protocol] if protocol else [])
            plain = socket.create_connection(("127.0.0.1", self._port))
            return theirs.wrap_socket(plain, server_hostname="127.0.0.1")

        self.tap = Tap(listener, upstream, own)

    def worker(self, node: str, site: Path) -> list[str]:
        if not self._scripted:
            return super().worker(node, site)
        return [sys.executable, "-m", "tests.support.scripted_worker", str(site)]

    def supernode(self, node: str, socket_path: Path) -> list[str]:
        words = super().supernode(node, socket_path)
        words[words.index("--superlink") + 1] = f"127.0.0.1:{self._tap_port}"
        return words

    def keep_database(self) -> None:
        """Keep what the SuperLink's database holds now and has not held before."""
        for path in self.folder.glob(f"{DATABASE}*"):
            with contextlib.suppress(FileNotFoundError):  # a journal comes and goes
                now = path.read_bytes()
                blocks = (now[start : start + BLOCK] for start in range(0, len(now), BLOCK))
                self.stored.update(dict.fromkeys(blocks))

    def _start(self, name: str, words: list[str]) -> None:
        more = ["--database", str(self.folder / DATABASE)] if name == "superlink" else []
        super()._start(name, [*words, *more])


def write_site(world: Tiny, folder: Path, node: str, masks: Mapping[str, Any] | None) -> Path:
    """The ``site.yaml`` of a node."""
    more = {"masks": masks} if masks else {}
    path = {"path": str(folder / f"{node}.d" / "s")}
    site = folder / f"{node}.yaml"
    site.write_text(yaml.safe_dump(site_tree(world, folder, node, socket=path, **more)))
    return site


@pytest.mark.parametrize("kind", ["clear", "masks", "errors"])
def test_no_canary_reaches_the_servers_side(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    masked, fails = kind == "masks", kind == "errors"
    folder = tmp_path_factory.mktemp("f")
    world, canaries = plant(tiny, folder, NODES)
    for node in NODES:
        canaries.learn_text(str(folder / f"{node}.d" / "s"), "path of the socket")
    config = world.config_file(
        folder / "server.yaml",
        folder / "runs",
        data={"items": str(world.items)},
        evaluation__splits=["test"],
        **SETTINGS,
        **({"federation__masks": True} if masked else {}),
    )
    masks = masks_of(folder) if masked else {}
    sites = {node: write_site(world, folder, node, masks.get(node)) for node in NODES}
    for site in sites.values():
        write_script(site)
    if fails:
        canaries.learn_text(SECRET, "text of an exception")
        write_script(sites[NODES[-1]], r2="fail")
    lab = OpenLab(folder, make_authority(folder / "keys", NODES), sites, scripted=fails)
    with lab.tap, lab:
        lab.run(config, lab.keep_database, 600.0)
        lab.keep_database()
    run = folder / "runs" / "tiny"
    refused = [one["refused"] for one in MetricsLog(run / METRICS_FILE).read()]
    assert refused[0] == 0
    assert bool(refused[1]) == fails
    if fails:  # what was thrown is told at the node, and so could have left it
        assert SECRET in (folder / f"{NODES[-1]}.worker.log").read_text()
    for node in NODES:
        [own] = (folder / f"{node}.private" / "federations").iterdir()
        assert canaries.learn_store(node, PrivateStore(own))
    things = {
        "from the nodes": b"".join(map(bytes, lab.tap.from_clients)),
        "database": b"".join(lab.stored),
        "superlink.log": (folder / "superlink.log").read_bytes(),
        "run.log": (folder / "run.log").read_bytes(),
        **files_below(folder / "runs"),
    }
    assert canaries.search(things) == {}
    # What was searched are the messages in the clear, not those of TLS.
    assert all(ANSWERED in things[place] for place in ("from the nodes", "database"))
