"""The socket: frames that are bounded, refusals in codes, and a server that outlives its peers."""

import contextlib
import grp
import json
import os
import pwd
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import BusyError, ConfigError, NodeError, NodeRefused, StorageError
from pfm_llm.config.text import validated
from pfm_llm.node import serve as serving
from pfm_llm.node.client import NodeClient
from pfm_llm.node.frames import MAGIC, MAX_HEADER, receive_frame
from pfm_llm.node.serve import Stop, serve
from pfm_llm.node.site import SiteConfig
from pfm_llm.protocol.refusals import NodeRefusal

ROOT = Path(__file__).parents[3]
SIZES = struct.Struct(">7sBIQ")


class Echo:
    """In place of a worker: answers with what it was asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def answer(self, call: str, header: bytes, body: bytes) -> tuple[bytes, bytes]:
        self.calls.append(call)
        if call == "refuse":
            raise NodeRefused(NodeRefusal.SLOTS, "user 42 is not here")
        if call == "much":
            return b"{}", b"x" * 2_000_001
        return header, body


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    folder = tmp_path_factory.mktemp("n")
    tree = {"data": {"source": "x.csv"}, "folder": str(folder / "p"), "max_message_mb": 2}
    return validated(tree, SiteConfig, "site.yaml")


@contextlib.contextmanager
def served(worker: Any, site: SiteConfig) -> Iterator[Stop]:
    stop = Stop()
    thread = threading.Thread(target=serve, args=(worker, site, stop))
    thread.start()
    try:
        for _ in range(1000):
            with contextlib.suppress(NodeError):
                NodeClient(site.socket_path).call("about")
                break
            threading.Event().wait(0.02)
        yield stop
    finally:
        stop.set()
        thread.join(timeout=30)
    assert not thread.is_alive()
    assert not site.socket_path.exists()


@pytest.fixture
def echo(site: SiteConfig) -> Iterator[Echo]:
    worker = Echo()
    with served(worker, site):
        yield worker


def raw(site: SiteConfig, content: bytes, half: bool = True) -> dict[str, Any] | None:
    """Send bytes as they are; the header of what comes back, or None at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        connection.connect(str(site.socket_path))
        connection.sendall(content)
        if half:
            connection.shutdown(socket.SHUT_WR)
        try:
            header, _ = receive_frame(connection, 1000)
        except Exception:
            return None
        found: dict[str, Any] = json.loads(header)
        return found


def frame(header: bytes, body: bytes = b"", version: int = 1) -> bytes:
    return SIZES.pack(MAGIC, version, len(header), len(body)) + header + body


def test_bytes_pass_through_both_ways(echo: Echo, site: SiteConfig) -> None:
    header, body = NodeClient(site.socket_path).call("about", b'{"n": 1}', b"\x00\xff" * 500_000)
    assert json.loads(header) == {"n": 1}
    assert body == b"\x00\xff" * 500_000
    assert NodeClient(site.socket_path).call("about") == (b"{}", b"")


def test_a_refusal_is_a_code_and_no_text(echo: Echo, site: SiteConfig) -> None:
    with pytest.raises(NodeRefused) as raised:
        NodeClient(site.socket_path).call("refuse")
    assert raised.value.code == NodeRefusal.SLOTS
    assert "42" not in str(raised.value)
    answer = raw(site, frame(b'{"call": "refuse"}'))
    assert answer == {"refused": "slots"}


HOSTILE = {
    "nothing": (b"", None),
    "a few bytes": (b"PFM", {"refused": "malformed"}),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", {"refused": "malformed"}),
    "another version": (frame(b"{}", version=9), {"refused": "version"}),
    "a huge header": (SIZES.pack(MAGIC, 1, MAX_HEADER + 1, 0), {"refused": "too_large"}),
    "a huge body": (SIZES.pack(MAGIC, 1, 2, 2**63), {"refused": "too_large"}),
    "a cut header": (SIZES.pack(MAGIC, 1, 50, 0) + b"{}", {"refused": "malformed"}),
    "a cut body": (SIZES.pack(MAGIC, 1, 2, 50) + b"{}abc", {"refused": "malformed"}),
    "no JSON": (frame(b"\xff\xfe"), {"refused": "malformed"}),
    "deep JSON": (frame(b"[" * 1_000_000), {"refused": "malformed"}),
    "a list": (frame(b"[]"), {"refused": "malformed"}),
    "no call": (frame(b'{"message": {}}'), {"refused": "malformed"}),
    "a call of another type": (frame(b'{"call": ["about"]}'), {"refused": "malformed"}),
    "too large an answer": (frame(b'{"call": "much"}'), {"refused": "too_large"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_request_is_refused_and_the_server_goes_on(
    echo: Echo, site: SiteConfig, name: str
) -> None:
    content, expected = HOSTILE[name]
    assert raw(site, content) == expected
    assert NodeClient(site.socket_path).call("about") == (b"{}", b"")


def test_a_peer_that_goes_at_any_moment_stops_nobody(echo: Echo, site: SiteConfig) -> None:
    whole = frame(b'{"call": "about", "message": {}}', b"x" * 1_000_000)
    for cut in (0, 5, len(whole) // 2, len(whole)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(site.socket_path))
            connection.sendall(whole[:cut])
    assert NodeClient(site.socket_path).call("about") == (b"{}", b"")


def test_a_peer_that_says_nothing_is_dropped(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "READ_SECONDS", 0.1)
    with served(Echo(), site), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as idle:
        idle.connect(str(site.socket_path))
        assert NodeClient(site.socket_path).call("about") == (b"{}", b"")
        idle.settimeout(30)
        assert idle.recv(1) == b""


def test_only_the_owner_can_reach_the_socket(echo: Echo, site: SiteConfig) -> None:
    assert stat.S_IMODE(site.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(site.socket_path.parent.stat().st_mode) == 0o700


def test_a_group_may_be_let_in(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, own = tmp_path_factory.mktemp("g"), grp.getgrgid(os.getgid()).gr_name
    tree = {
        "data": {"source": "x.csv"},
        "folder": str(folder / "p"),
        "socket": {
            "path": str(folder / "s" / "n.sock"),
            "group": own,
        },
    }
    site = validated(tree, SiteConfig, "site.yaml")
    with served(Echo(), site):
        assert stat.S_IMODE(site.socket_path.stat().st_mode) == 0o660
        assert stat.S_IMODE(site.socket_path.parent.stat().st_mode) == 0o750
        assert stat.S_IMODE(site.root.stat().st_mode) == 0o700


def test_the_owner_may_forget_and_another_user_of_the_system_may_not(
    echo: Echo, site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = NodeClient(site.socket_path)
    assert client.call("forget", b'{"user": "7"}')[0] == b'{"user": "7"}'
    for other in (os.geteuid() + 1, None):
        monkeypatch.setattr(serving, "_user_of", lambda connection, user=other: user)
        with pytest.raises(NodeRefused) as refused:
            client.call("forget", b'{"user": "7"}')
        assert refused.value.code == NodeRefusal.NOT_ALLOWED
    assert client.call("about")
    assert echo.calls.count("forget") == 1


FORGET = """
import os, sys
from pfm_llm.base.errors import NodeRefused
from pfm_llm.node.client import NodeClient
path, user, group = sys.argv[1:]
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
client = NodeClient(path, timeout=60)
client.call("about")
try:
    client.call("forget", b'{"user": "7"}')
except NodeRefused as refused:
    print(refused.code)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_process_of_another_user_reaches_the_socket_and_cannot_forget() -> None:
    """As two users run a node: the engine's process is in the group of the socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        tree = {
            "data": {"source": "x.csv"},
            "folder": str(folder / "p"),
            "socket": {"path": str(folder / "s" / "n.sock"), "group": "nogroup"},
        }
        site, worker = validated(tree, SiteConfig, "site.yaml"), Echo()
        other = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("nogroup").gr_gid
        words = [sys.executable, "-c", FORGET, str(site.socket_path), *map(str, other)]
        with served(worker, site):
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("not_allowed\n", "")
    assert "forget" not in worker.calls


def test_one_worker_serves_a_folder(echo: Echo, site: SiteConfig) -> None:
    with pytest.raises(BusyError, match="another worker serves"):
        serve(Echo(), site, Stop())  # type: ignore[arg-type]
    assert NodeClient(site.socket_path).call("about") == (b"{}", b"")


def test_a_socket_that_a_killed_worker_left_is_replaced_and_a_file_is_not(
    site: SiteConfig,
) -> None:
    site.socket_path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(site.socket_path))
    with served(Echo(), site):
        assert NodeClient(site.socket_path).call("about") == (b"{}", b"")
    site.socket_path.write_text("mine")
    with pytest.raises(StorageError, match="is no socket"):
        serve(Echo(), site, Stop())  # type: ignore[arg-type]
    assert site.socket_path.read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("path", "/tmp/" + "x" * 120, "longer than the 100 bytes"),
        ("group", "no-such-group-here", "there is no group 'no-such-group-here'"),
    ],
)
def test_a_socket_that_cannot_be_made_is_said(
    site: SiteConfig, key: str, value: str, message: str
) -> None:
    site = site.model_copy(update={"socket": site.socket.model_copy(update={key: value})})
    with pytest.raises(ConfigError, match=message):
        serve(Echo(), site, Stop())  # type: ignore[arg-type]


def test_a_client_without_a_node_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"no answer from a node .*pfm node serve"):
        NodeClient(tmp_path / "no.sock").call("about")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400", frame(b"{}"), frame(b"[]")])
def test_a_client_of_something_else_says_so(
    tmp_path_factory: pytest.TempPathFactory, answer: bytes
) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def once() -> None:
            connection, _ = listener.accept()
            with connection:
                receive_frame(connection, 1000)
                connection.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        with pytest.raises(NodeError, match="does not answer as a node does"):
            NodeClient(path).call("about")
        thread.join()


def test_the_client_imports_the_standard_library_alone(tmp_path: Path) -> None:
    """A process that is started for each message has no second for torch, pydantic or numpy."""
    program = (
        "import sys; before = {*sys.modules}\n"
        "import pfm_llm.node.client, pfm_llm.node.frames\n"
        "new = {name.split('.')[0] for name in {*sys.modules} - before} - {'pfm_llm'}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_a_stop_waits_for_the_request_under_way(site: SiteConfig) -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(Echo):
        def answer(self, call: str, header: bytes, body: bytes) -> tuple[bytes, bytes]:
            if header != b"{}":  # the fixture's own call
                entered.set()
                go.wait(30)
            return super().answer(call, header, body)

    found: list[tuple[bytes, bytes]] = []
    ask: Callable[[], None] = lambda: found.append(  # noqa: E731
        NodeClient(site.socket_path).call("about", b'{"n": 2}')
    )
    with served(Slow(), site) as stop:
        thread = threading.Thread(target=ask)
        thread.start()
        entered.wait(30)
        stop.set()
        go.set()
        thread.join(30)
    assert found == [(b'{"n": 2}', b"")]
