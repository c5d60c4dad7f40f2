"""Calls in Flower's messages: the node's bytes arrive as they were, and nothing else does."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity

from pfm_llm.base.errors import ConfigError, NodeError, NodeRefused
from pfm_llm.flower import client_app, server_app, wire
from pfm_llm.flower.link import FlowerLink
from pfm_llm.protocol.calls import CALLS, OF_THE_OWNER
from pfm_llm.protocol.messages import AboutReply, AboutRequest, ForgetRequest, encode
from pfm_llm.protocol.refusals import NodeRefusal

ROOT = Path(__file__).parents[3]
NOT_TAKEN = object()
"""Stands for a message that the SuperLink does not take."""
REPLY = AboutReply(version="1", min_users=5, single_updates=False)
"""What a node answers; it has no tensors."""


def context(**node_config: Any) -> Context:
    return Context(1, 1, node_config, RecordDict(), {})


def request(content: RecordDict, ttl: float = 5.0, kind: str = "train") -> Message:
    metadata = Metadata(1, "m1", 0, 7, "", "", 0.0, ttl, kind)
    return Message(metadata=metadata, content=content)  # type: ignore[call-overload]


def test_bytes_arrive_as_they_were() -> None:
    for body in (b"", b"\x00\xff" * 9):
        assert wire.unpack(wire.pack(b'{"a": 1}', body)) == (b'{"a": 1}', body)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (RecordDict(), NodeRefusal.MALFORMED),
        (RecordDict({"pfm": ConfigRecord({"header": "text"})}), NodeRefusal.MALFORMED),
        (
            RecordDict(
                {
                    "pfm": ConfigRecord({"header": b"{}"}),
                    "body": ArrayRecord({"other": Array("uint8", (1,), "safetensors", b"x")}),
                }
            ),
            NodeRefusal.MALFORMED,
        ),
        (
            RecordDict(
                {
                    "pfm": ConfigRecord({"header": b"{}"}),
                    "body": ArrayRecord({"body": Array("uint8", (1,), "numpy.ndarray", b"x")}),
                }
            ),
            NodeRefusal.MALFORMED,
        ),
        (wire.pack(b"{}", b"x" * 101), NodeRefusal.TOO_LARGE),
        (wire.pack(b" " * 4_000_001, b""), NodeRefusal.TOO_LARGE),
        (wire.pack_refusal(NodeRefusal.TOO_FEW), NodeRefusal.TOO_FEW),
        (wire.pack_refusal("/home/ann/visits.csv"), NodeRefusal.FAILED),
    ],
)
def test_what_is_no_message_is_refused_with_a_code(content: RecordDict, code: str) -> None:
    with pytest.raises(NodeRefused) as refused:
        wire.unpack(content, max_body=100)
    assert refused.value.code == code


class FakeClient:
    """Stands for the client of a worker's socket."""

    def __init__(self, path: str, timeout: float | None) -> None:
        self.path, self.timeout = path, timeout

    def call(self, name: str, header: bytes, body: bytes) -> tuple[bytes, bytes]:
        if self.path == "refuses":
            raise NodeRefused(NodeRefusal.ROUND, "ann's file")
        if self.path == "away":
            raise NodeError("no answer from /home/ann/node.sock")
        if self.path == "broken":
            raise RuntimeError("ann's file")
        return f"{name} {self.timeout:g} ".encode() + header, body[::-1]


@pytest.fixture
def _fake_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "NodeClient", FakeClient)


@pytest.mark.usefixtures("_fake_client")
def test_the_client_app_hands_bytes_to_the_worker_and_no_text_of_an_error_back() -> None:
    asked = request(wire.pack(b"{}", b"abc"))
    answer = client_app.app(asked, context(socket="works"))
    assert wire.unpack(answer.content) == (b"train 5 {}", b"cba")
    for socket, code in (("refuses", NodeRefusal.ROUND), ("broken", NodeRefusal.FAILED)):
        content = client_app.answer("about", asked, context(socket=socket)).content
        assert content == wire.pack_refusal(code)
    for config in ({"socket": "away"}, {}):
        content = client_app.answer("evaluate", asked, context(**config)).content
        assert content == wire.pack_no_worker()
    assert client_app.app(request(RecordDict()), context(socket="works")).content == (
        wire.pack_refusal(NodeRefusal.MALFORMED)
    )


@pytest.mark.usefixtures("_fake_client")
@pytest.mark.parametrize("call", sorted(CALLS.keys() - set(OF_THE_OWNER)))
def test_every_call_but_to_forget_passes(call: str) -> None:
    asked = request(wire.pack(b"{}", b"abc"), kind=wire.MESSAGE_TYPES[call])
    answer = client_app.app(asked, context(socket="works"))
    assert wire.unpack(answer.content) == (f"{call} 5 {{}}".encode(), b"cba")


def test_the_client_app_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nimport pfm_llm.flower.client_app\n"
        "print([n for n in ('torch', 'transformers', 'pandas', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


class FakeGrid:
    """A SuperLink with nodes that answer from a table: contents, errors, or nothing."""

    def __init__(self, answers: dict[str, Any], offline: tuple[str, ...] = ()) -> None:
        self.answers, self.offline = answers, offline
        self.sent: list[Message] = []

    def get_nodes(self) -> list[Any]:
        names = [name for name in self.answers if name not in self.offline]
        return [SimpleNamespace(name=n.strip(), node_id=i) for i, n in enumerate(names, 1)]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        found = list(messages)
        self.sent += found
        self.named = {f"m{m.metadata.dst_node_id}": m for m in found}
        names = [self._name(message) for message in found]
        ids = list(self.named)
        return [None if self.answers[n] is NOT_TAKEN else i for n, i in zip(names, ids, strict=1)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for number in message_ids:
            answer = self.answers[self._name(self.named[number])]
            if answer is not None:
                metadata = Metadata(1, f"r{number}", 1, 0, number, "", 0.0, 5.0, "train")
                key = "error" if isinstance(answer, Error) else "content"
                found.append(Message(metadata=metadata, **{key: answer}))  # type: ignore[call-overload]
        return found

    def _name(self, message: Message) -> str:
        online = [name for name in self.answers if name not in self.offline]
        return online[message.metadata.dst_node_id - 1]


def link(grid: FakeGrid) -> FlowerLink:
    return FlowerLink(grid, list(grid.answers), timeout=0.6)  # type: ignore[arg-type]


@pytest.fixture
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages carry the identity of the ServerApp's process."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("_in_a_run")
def test_a_link_gives_answers_and_refusals_and_leaves_out_who_is_silent() -> None:
    grid = FakeGrid(
        {
            "answers": wire.pack(*encode(REPLY)),
            "refuses": wire.pack_refusal(NodeRefusal.TOO_FEW),
            "speaks another language": wire.pack(b"{}", b""),
            "has no worker": wire.pack_no_worker(),
            "crashed": Error(8, "ann's file"),
            "silent": None,
            "not taken": NOT_TAKEN,
            "offline": None,
        },
        offline=("offline",),
    )
    found = link(grid).ask("about", dict.fromkeys(grid.answers, AboutRequest()))
    assert found["answers"] == REPLY
    codes = {n: a.code for n, a in found.items() if isinstance(a, NodeRefused)}
    assert codes == {
        "refuses": NodeRefusal.TOO_FEW,
        "speaks another language": NodeRefusal.MALFORMED,
    }
    assert len(found) == 3
    assert {m.metadata.message_type for m in grid.sent} == {"query"}
    assert {m.metadata.ttl for m in grid.sent} == {0.6}


def test_equal_tensors_are_one_object_for_the_superlink() -> None:
    shared = {"w": torch.arange(4.0)}
    requests = [AboutRequest(settings={"n": n}, tensors=shared) for n in (1, 2)]
    packed = [wire.pack(*encode(one)) for one in requests]
    assert len({one["pfm"].object_id for one in packed}) == 2
    assert len({one["body"].object_id for one in packed}) == 1


@pytest.mark.usefixtures("_in_a_run")
def test_two_nodes_of_one_name_are_an_error_and_forgetting_is_no_message() -> None:
    grid = FakeGrid({"n01": None, "n01 ": None})
    with pytest.raises(NodeError, match="two SuperNodes are registered as n01"):
        link(grid).ask("about", {"n01": AboutRequest()})
    with pytest.raises(KeyError):
        link(FakeGrid({"n01": None})).ask("forget", {"n01": ForgetRequest(user="ann")})


def test_the_config_of_a_run_names_each_node_once() -> None:
    tree = {"config": "c", "timeout": 1.0, "wait": 0.0, "quorum": 1.0, "resume": False}
    assert server_app.RunOptions(nodes="n01, n02 n03", **tree).names == ["n01", "n02", "n03"]
    for nodes in ("", "n01 n01"):
        with pytest.raises(ConfigError, match="does not name each node once"):
            _ = server_app.RunOptions(nodes=nodes, **tree).names
