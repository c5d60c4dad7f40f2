"""What a node refuses in rounds under masks, and what keeps a run under masks from beginning."""

import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import ConfigError, NodeError, NodeRefused, StorageError, TrainingError
from pfm_llm.base.processes import Processes
from pfm_llm.config.text import validated
from pfm_llm.federation.masked_nodes import check_keys
from pfm_llm.federation.nodes import NodesOptions
from pfm_llm.federation.rounds import Federation
from pfm_llm.federation.server_side import ServerSide
from pfm_llm.node.masking import KEY_FILE
from pfm_llm.node.site import SiteConfig
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.calls import CALLS
from pfm_llm.protocol.mask_messages import AdvertiseRequest, MaskReply
from pfm_llm.protocol.messages import AboutReply, AboutRequest, MaskKeys, Message, TrainRequest
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.transport import as_sent
from pfm_llm.server.aggregation import Aggregator
from tests.support.nodes import NODES, Watched, federation, make_site, masks_of, side_of, site_tree
from tests.support.tiny import Tiny

SETTINGS: dict[str, Any] = {
    "method": "pfm",
    "federation__cohort_size": 24,
    "federation__stages": [{"clip": {"norm": 4.0}}],
    "federation__masks": True,
}
STEPS = ("advertise", "share", "mask", "confirm", "reveal")


@pytest.fixture(scope="module")
def side(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ServerSide:
    """The server of the tiny experiment, under masks."""
    return side_of(tiny, tmp_path_factory.mktemp("server"), **SETTINGS)


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path, one_process: Processes) -> Callable[..., Worker]:
    """Starts a worker that knows the keys of the others; ``masks`` changes what it knows."""

    def make(node: str, masks: Any = (), nodes: Sequence[str] = NODES, **site: Any) -> Worker:
        known = masks_of(tmp_path, nodes)[node]
        given = None if masks is None else {**known, **dict(masks)}
        return Worker(make_site(tiny, tmp_path, node, masks=given, **site), one_process)

    return make


@dataclass
class Play:
    """Three nodes that have played a round, which can be played again.

    Attributes:
        folder: Their files.
        link: Reaches them.
        found: The loop.
        asked: Step to what n01 was asked.
    """

    folder: Path
    link: Watched
    found: Federation
    asked: dict[str, Any] = field(default_factory=dict)

    def train(self) -> Aggregator:
        server = self.found.server
        return self.found.exchange.train(server.select_cohort(1), server.broadcast)

    def begin(self, done: int) -> dict[str, Any]:
        """The requests of a new round of which n01 has taken so many steps."""
        link, fresh = self.link, dict(self.asked)
        adverts = link.ask("advertise", dict.fromkeys(NODES, fresh["advertise"]))
        roster = tuple(adverts[node].keys for node in NODES)  # type: ignore[union-attr]
        fresh["share"] = fresh["share"].model_copy(update={"roster": roster})
        if done > 1:
            sealed: Any = link.ask("share", dict.fromkeys(NODES, fresh["share"]))
            received = {node: sealed[node].sealed["n01"] for node in NODES[1:]}
            fresh["mask"] = fresh["mask"].model_copy(update={"received": received})
        for step in STEPS[2:done]:
            link.ask(step, {"n01": fresh[step]})
        return fresh


@pytest.fixture(scope="module")
def played(
    tiny: Tiny,
    side: ServerSide,
    one_process: Processes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Play:
    folder = tmp_path_factory.mktemp("nodes")
    masks = masks_of(folder)
    sites = {node: make_site(tiny, folder, node, masks=masks[node]) for node in NODES}
    link = Watched({node: Worker(site, one_process) for node, site in sites.items()})
    play = Play(folder, link, federation(side, link, folder / "run", one_process))
    assert play.train().tally.num_updates == 24
    play.asked = {call: request for call, node, request, _ in link.passed if node == "n01"}
    return play


@pytest.fixture
def play(played: Play) -> Iterator[Play]:
    played.link.passed.clear()
    change = played.link.change
    yield played
    played.link.change = change


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(NodeRefused) as raised:
        act()
    return raised.value.code


def call(worker: Worker, step: str, request: Message) -> Any:
    return getattr(worker, step)(request)


def train_request(side: ServerSide, **more: Any) -> TrainRequest:
    return TrainRequest(
        agreement=side.agreement.hash(),
        round_number=1,
        slots=(0, 1, 2),
        cohort_size=24,
        tensors=as_sent(side.model.shared.tensors, side.model.contract.tensors),
        **more,
    )


def advertise_request(side: ServerSide) -> AdvertiseRequest:
    return AdvertiseRequest(agreement=side.agreement.hash(), round_number=1, num_nodes=3)


def test_a_key_is_made_at_the_first_start_and_only_its_owner_can_read_it(
    tiny: Tiny, tmp_path: Path, one_process: Processes
) -> None:
    none = Worker(make_site(tiny, tmp_path, "n02"), one_process)
    assert none.about(AboutRequest()).masks is None
    assert not (tmp_path / "n02.private" / KEY_FILE).exists()
    site = make_site(tiny, tmp_path, "n01", masks={"name": "n01"})
    told = [Worker(site, one_process).about(AboutRequest()).masks for _ in range(2)]
    assert told[0] == told[1]
    assert told[0] is not None
    assert (told[0].name, told[0].peers, told[0].required) == ("n01", {}, True)
    path = tmp_path / "n01.private" / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert masks_of(tmp_path)["n02"]["peers"]["n01"] == told[0].key.hex()
    path.chmod(0o644)
    with pytest.raises(StorageError, match="can be read or written by others"):
        Worker(site, one_process)


@pytest.mark.parametrize("masks", [None, {"peers": {}}, {"peers": {"n02": "0" * 64}}])
def test_a_node_that_does_not_know_two_others_masks_nothing(
    start: Any, side: ServerSide, masks: Any
) -> None:
    worker = start("n01", masks)
    assert refused(lambda: worker.advertise(advertise_request(side))) == NodeRefusal.NOT_READY
    worker.about(side.invitation)
    assert refused(lambda: worker.advertise(advertise_request(side))) == NodeRefusal.NO_MASKS


def test_a_node_whose_owner_wants_masks_sends_no_sum_in_the_clear(
    start: Any, side: ServerSide
) -> None:
    allow = {"backbones": [side.config.backbone.name], "single_updates": True}
    worker = start("n01", allow=allow)
    worker.about(side.invitation)
    for single in (False, True):
        asked = train_request(side, single=single)
        assert refused(lambda asked=asked: worker.train(asked)) == NodeRefusal.MASKS_REQUIRED
    worker = start("n01", {"required": False})
    worker.about(side.invitation)
    assert worker.train(train_request(side)).updates[0].num_clients == 3


def test_a_server_that_has_not_set_masks_gets_none(start: Any, tiny: Tiny, tmp_path: Path) -> None:
    clear = side_of(tiny, tmp_path, **{**SETTINGS, "federation__masks": False})
    worker = start("n01")
    worker.about(clear.invitation)
    assert refused(lambda: worker.advertise(advertise_request(clear))) == NodeRefusal.MASKS


def test_steps_come_once_and_in_order(play: Play) -> None:
    worker = play.link.workers["n01"]
    play.train()
    for step in STEPS[1:]:  # the round has ended, and its secrets are forgotten
        assert refused(lambda s=step: call(worker, s, play.asked[s])) == NodeRefusal.MASKS
    for done in range(1, 5):
        for wrong in [step for step in STEPS[1:] if step != STEPS[done]]:
            fresh = play.begin(done)
            assert refused(lambda s=wrong, r=fresh: call(worker, s, r[s])) == NodeRefusal.MASKS


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_step_of_another_round_or_federation_is_refused(play: Play, step: str) -> None:
    worker = play.link.workers["n01"]
    asked = play.begin(1)[step]
    later = asked.model_copy(update={"round_number": 2})
    assert refused(lambda: call(worker, step, later)) == NodeRefusal.MASKS
    other = asked.model_copy(update={"agreement": "0" * 64})
    code = NodeRefusal.AGREEMENT if step == "mask" else NodeRefusal.MASKS
    assert refused(lambda: call(worker, step, other)) == code


def test_another_invitation_ends_the_round_under_way(play: Play, side: ServerSide) -> None:
    fresh, worker = play.begin(1), play.link.workers["n01"]
    worker.about(AboutRequest())  # which only tells
    assert worker.share(fresh["share"]).sealed.keys() == {"n02", "n03"}
    worker.about(side.invitation)
    assert refused(lambda: worker.mask(fresh["mask"])) == NodeRefusal.MASKS


def test_nobody_trains_for_a_step_out_of_order(play: Play) -> None:
    fresh = play.begin(1)
    [path] = (play.folder / "n01.private" / "federations").glob("*/asked.json")
    before = path.read_bytes()
    asked = fresh["mask"].model_copy(update={"slots": (0,), "round_number": 9})
    play.link.workers["n01"].advertise(fresh["advertise"].model_copy(update={"round_number": 9}))
    assert refused(lambda: play.link.workers["n01"].mask(asked)) == NodeRefusal.MASKS
    assert path.read_bytes() == before


def test_two_sums_of_a_round_over_other_clients_are_refused_under_masks_too(play: Play) -> None:
    fewer = play.begin(2)["mask"].model_copy(update={"slots": (0, 1)})
    assert refused(lambda: play.link.workers["n01"].mask(fewer)) == NodeRefusal.ROUND


def test_a_server_that_swaps_a_key_or_denies_a_node_gets_nothing(play: Play) -> None:
    worker = play.link.workers["n01"]
    for bend in ("mask_key", "node"):
        fresh = play.begin(1)
        first, second, third = fresh["share"].roster
        other = {"mask_key": third.mask_key, "node": "n04"}[bend]
        roster = (first, second.model_copy(update={bend: other}), third)
        asking = fresh["share"].model_copy(update={"roster": roster})
        assert refused(lambda asking=asking: worker.share(asking)) == NodeRefusal.PEERS
    without = play.begin(3)["confirm"].model_copy(update={"survivors": ("n02", "n03")})
    assert refused(lambda: worker.confirm(without)) == NodeRefusal.MASKS


def test_a_node_with_a_wrong_key_of_another_is_named_before_the_run_and_refuses_in_it(
    start: Any, side: ServerSide, tmp_path: Path, one_process: Processes, monkeypatch: Any
) -> None:
    peers = {**masks_of(tmp_path)["n01"]["peers"], "n02": "ab" * 32}
    link = Watched({"n01": start("n01", {"peers": peers}), **{n: start(n) for n in NODES[1:]}})
    with pytest.raises(NodeError, match=r"n01 does not know the key of n02.*peers: \{n02: …\}"):
        federation(side, link, tmp_path / "run", one_process)
    monkeypatch.setattr("pfm_llm.federation.nodes.check_keys", lambda replies: None)
    found = federation(side, link, tmp_path / "run", one_process)
    total = found.exchange.train(found.server.select_cohort(1), found.server.broadcast)
    assert dict(total.tally.reasons) == {NodeRefusal.PEERS: 8}
    assert total.tally.num_updates == 16


def told(name: str, **peers: bytes) -> AboutReply:
    keys = MaskKeys(name=name, key=name.encode() * 16, peers=peers, required=True)
    return AboutReply(version="1", min_users=5, single_updates=False, masks=keys)


def test_the_nodes_of_a_run_know_each_other() -> None:
    check_keys({"ab": told("ab", cd=b"cd" * 16), "cd": told("cd", ab=b"ab" * 16)})
    clear = AboutReply(version="1", min_users=5, single_updates=False)
    for replies, message in (
        ({"ab": clear}, "node ab masks no sums; its owner sets `masks`"),
        ({"ab": told("xy")}, "node ab signs as 'xy'.*masks.name: ab"),
        ({"ab": told("ab"), "cd": told("cd", ab=b"ab" * 16)}, "ab does not know the key of cd"),
    ):
        with pytest.raises(NodeError, match=message):
            check_keys(replies)


@pytest.mark.parametrize(
    ("settings", "options", "nodes", "message"),
    [
        ({}, NodesOptions(), NODES[:2], "at least 3 nodes, these are 2"),
        ({}, NodesOptions(single=True), NODES, "masks hide single updates; ask for sums"),
        (
            {"federation__cohort_size": None, "federation__masks": {"max_examples": 2**29}},
            NodesOptions(),
            NODES,
            "set masks.max_examples to at most",
        ),
    ],
)
def test_a_run_that_cannot_be_masked_does_not_begin(
    start: Any,
    tiny: Tiny,
    tmp_path: Path,
    one_process: Processes,
    settings: dict[str, Any],
    options: NodesOptions,
    nodes: Sequence[str],
    message: str,
) -> None:
    side = side_of(tiny, tmp_path, **{**SETTINGS, **settings})
    link = Watched({node: start(node) for node in nodes})
    with pytest.raises(ConfigError, match=message):
        federation(side, link, tmp_path / "run", one_process, options)
    assert {name for name, *_ in link.passed} == {"about"}


def test_a_cohort_at_two_nodes_is_not_masked(play: Play) -> None:
    cohort, shared = ["n01/00000", "n02/00000", "n02/00001"], play.found.server.broadcast
    with pytest.raises(TrainingError, match=r"its clients are at 2 nodes.*raise federation\.coh"):
        play.found.exchange.train(cohort, shared)
    assert play.link.passed == []


@pytest.mark.parametrize("bend", ["fewer words", "floats", "more tensors", "more clients", "round"])
def test_what_is_no_answer_of_a_node_costs_its_clients_alone(play: Play, bend: str) -> None:
    def bent(step: str, node: str, answer: Any) -> Any:
        if (step, node) != ("mask", "n02"):
            return answer
        assert isinstance(answer, MaskReply)
        words = answer.tensors["words"]
        changes: dict[str, dict[str, Any]] = {
            "fewer words": {"tensors": {"words": words[1:]}},
            "floats": {"tensors": {"words": words.float()}},
            "more tensors": {"tensors": {"words": words, "private.x": torch.zeros(1)}},
            "more clients": {"num_clients": 9},
            "round": {"round_number": 2},
        }
        return answer.model_copy(update=changes[bend])

    play.link.change = bent
    total = play.train()
    reason = "round" if bend == "round" else "malformed"
    assert dict(total.tally.reasons) == {reason: 8}
    assert total.tally.num_updates == 16
    assert all(bool(tensor.isfinite().all()) for tensor in total.result().values())


KEY, SEALED, SIGNATURE = "00" * 32, "00" * 148, "00" * 64
HEAD = '"agreement": "' + "0" * 64 + '", "round_number": 1'


@pytest.mark.parametrize(
    ("step", "fields"),
    [
        ("advertise", '"num_nodes": 2'),
        ("advertise", '"num_nodes": 1001'),
        ("advertise", '"num_nodes": 3, "threshold": 1'),
        ("share", '"roster": []'),
        ("share", f'"roster": [{{"node": "n01", "seal_key": "{KEY[2:]}"}}]'),
        ("mask", f'"slots": [0], "cohort_size": 8, "received": {{"n02": "{SEALED}00"}}'),
        (
            "mask",
            '"slots": [0], "cohort_size": 8, "single": true, "received": {}',
        ),
        ("mask", '"slots": [0], "cohort_size": 8'),
        ("confirm", '"survivors": ["n01"]'),
        ("confirm", '"survivors": ["n01", 2]'),
        ("reveal", f'"signatures": {{"n01": "{SIGNATURE[2:]}"}}'),
        ("reveal", f'"signatures": {{"n01": "{"x" * 128}"}}'),
    ],
)
def test_bytes_that_are_no_step_are_refused(start: Any, step: str, fields: str) -> None:
    worker = start("n01")
    header = f"{{{HEAD}, {fields}}}".encode()
    assert refused(lambda: worker.answer(step, header, b"")) == NodeRefusal.MALFORMED


def test_every_call_is_a_method_of_a_worker() -> None:
    assert all(callable(getattr(Worker, name)) for name in CALLS)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"name": "n01", "peers": {"n01": KEY}}, "holds n01, which is this node"),
        ({"name": "n01", "peers": {"n02": KEY, "n03": KEY}}, "two nodes have one key"),
        ({"name": "n01", "peers": {"n02": KEY[1:]}}, "peers"),
        ({"peers": {}}, "name"),
    ],
)
def test_a_wrong_section_of_a_site_is_said(
    tiny: Tiny, tmp_path: Path, masks: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(site_tree(tiny, tmp_path, "n01", masks=masks), SiteConfig, "site.yaml")
