"""What a node answers, what it refuses, and what never leaves it."""

import dataclasses
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import ConfigError, NodeError, NodeRefused, TrainingError
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.text import validated
from pfm_llm.federation.members import ask_members
from pfm_llm.federation.nodes import NodesOptions
from pfm_llm.federation.server_side import ServerSide
from pfm_llm.node.link import LocalLink
from pfm_llm.node.site import SiteConfig, load_site
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.messages import (
    AboutRequest,
    ForgetReply,
    ForgetRequest,
    TrainReply,
    TrainRequest,
    encode,
)
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.transport import as_sent
from tests.support.nodes import federation, histories_of, make_site, side_of, site_tree
from tests.support.tiny import Tiny, write_items

Ask = Callable[..., TrainRequest]


@pytest.fixture(scope="module")
def side(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ServerSide:
    """The server of the tiny experiment, whose clients keep a private LoRA."""
    return side_of(tiny, tmp_path_factory.mktemp("server"), method="custom")


@pytest.fixture
def make_worker(tiny: Tiny, tmp_path: Path, one_process: Processes) -> Callable[..., Worker]:
    """Workers of the node n01 with eight users, in one folder."""

    def make(**settings: Any) -> Worker:
        return Worker(make_site(tiny, tmp_path, "n01", **settings), one_process)

    return make


@pytest.fixture
def ask(side: ServerSide) -> Ask:
    """Requests to train."""

    def make(slots: tuple[int, ...] = (0, 1, 2, 3, 4), round_number: int = 1, **more: Any) -> Any:
        fields: dict[str, Any] = {
            "agreement": side.agreement.hash(),
            "round_number": round_number,
            "slots": slots,
            "cohort_size": 8,
            "tensors": as_sent(side.model.shared.tensors, side.model.contract.tensors),
            **more,
        }
        return TrainRequest(**fields)

    return make


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(NodeRefused) as raised:
        act()
    return raised.value.code


def federation_folder(tmp_path: Path) -> Path:
    [folder] = (tmp_path / "n01.private" / "federations").iterdir()
    return folder


def test_a_node_tells_little_before_it_takes_part(make_worker: Any, ask: Ask) -> None:
    worker = make_worker(min_users_per_sum=3)
    found = worker.about(AboutRequest())
    assert (found.agreed, found.num_clients, found.dtype) == (None, 0, "")
    assert (found.min_users, found.single_updates) == (3, False)
    assert refused(lambda: worker.train(ask())) == NodeRefusal.NOT_READY
    assert refused(lambda: worker.forget(ForgetRequest(user="u0"))) == NodeRefusal.NOT_READY


def test_a_node_that_takes_part_agrees_and_counts_its_clients(
    make_worker: Any, side: ServerSide
) -> None:
    found = make_worker().about(side.invitation)
    assert found.agreed.value == side.agreement
    assert (found.num_clients, found.dtype) == (8, "float32")


def test_a_sum_over_too_few_users_is_refused_and_no_round_is_used_up(
    make_worker: Any, side: ServerSide, ask: Ask
) -> None:
    worker = make_worker(min_users_per_sum=5)
    worker.about(side.invitation)
    assert refused(lambda: worker.train(ask((0, 1, 2, 3)))) == NodeRefusal.TOO_FEW
    assert worker.train(ask((0, 1, 2, 3, 4))).updates[0].num_clients == 5


def test_two_sums_of_a_round_over_other_clients_are_refused_also_after_a_restart(
    make_worker: Any, side: ServerSide, ask: Ask
) -> None:
    """Their difference would be an update."""
    worker = make_worker()
    worker.about(side.invitation)
    first = worker.train(ask((0, 1, 2)))
    assert refused(lambda: worker.train(ask((0, 1)))) == NodeRefusal.ROUND
    again = worker.train(ask((2, 1, 0)))
    assert again.updates == first.updates
    worker = make_worker()
    worker.about(side.invitation)
    assert refused(lambda: worker.train(ask((0, 1)))) == NodeRefusal.ROUND
    assert worker.train(ask((0, 1), round_number=2)).updates[0].num_clients == 2


@pytest.mark.parametrize("slots", [(0, 0), (8,), (0, 1, 99)])
def test_slots_that_do_not_exist_are_refused(
    make_worker: Any, side: ServerSide, ask: Ask, slots: tuple[int, ...]
) -> None:
    worker = make_worker()
    worker.about(side.invitation)
    assert refused(lambda: worker.train(ask(slots))) == NodeRefusal.SLOTS


def test_a_request_of_another_federation_or_with_other_tensors_is_refused(
    make_worker: Any, side: ServerSide, ask: Ask
) -> None:
    worker = make_worker()
    worker.about(side.invitation)
    assert refused(lambda: worker.train(ask(agreement="0" * 64))) == NodeRefusal.AGREEMENT
    tensors = ask().tensors
    name = min(tensors)
    for wrong in (
        {},
        {**tensors, "private.x": torch.zeros(1)},
        {**tensors, name: tensors[name].double()},
        {**tensors, name: tensors[name][:1]},
    ):
        assert refused(lambda wrong=wrong: worker.train(ask(tensors=wrong))) == "malformed"


def test_single_updates_leave_only_where_both_sides_say_so(
    make_worker: Any, side: ServerSide, ask: Ask
) -> None:
    worker = make_worker()
    worker.about(side.invitation)
    assert refused(lambda: worker.train(ask(single=True))) == NodeRefusal.NOT_ALLOWED
    worker = make_worker(allow={"backbones": [side.config.backbone.name], "single_updates": True})
    worker.about(side.invitation)
    assert worker.train(ask((0, 1))).updates[0].slot is None
    reply = worker.train(ask((1, 0), single=True))
    assert [(head.slot, head.num_clients) for head in reply.updates] == [(0, 1), (1, 1)]
    total = worker.train(ask((0, 1))).deltas()[0]
    one, two = reply.deltas()
    assert all(torch.allclose(one[n] + two[n], total[n], rtol=1e-4, atol=1e-7) for n in total)


def test_single_updates_train_as_sums_do(
    make_worker: Any, side: ServerSide, tmp_path: Path, one_process: Processes
) -> None:
    allow = {"backbones": [side.config.backbone.name], "single_updates": True}
    link = LocalLink({"n01": make_worker(allow=allow)})
    options = NodesOptions(single=True)
    found = federation(side, link, tmp_path / "run", one_process, options)
    cohort = found.server.select_cohort(1)
    each = found.exchange.train(cohort, found.server.broadcast)
    assert each.tally.num_updates == len(cohort) == 4
    assert found.exchange.diagnostics["bytes_up"] == 4 * side.model.table.num_bytes


def test_private_states_outlive_the_worker_and_newer_ones_are_discarded(
    make_worker: Any, side: ServerSide, ask: Ask, tmp_path: Path
) -> None:
    worker = make_worker()
    worker.about(side.invitation)
    worker.train(ask((0, 1)))
    worker.train(ask((0, 1, 2), round_number=2))
    store = PrivateStore(federation_folder(tmp_path))
    assert sorted(map(store.versions, store.client_ids())) == [(1, 2), (1, 2), (2,)]
    worker = make_worker()
    worker.about(side.invitation)
    assert sorted(map(store.versions, store.client_ids())) == [(1, 2), (1, 2), (2,)]
    worker.train(ask((0, 1, 2), round_number=2, discard_newer=1))
    worker.train(ask((0, 1), round_number=3, oldest_commit=2))
    assert sorted(map(store.versions, store.client_ids())) == [(2,), (2, 3), (2, 3)]


def test_slots_are_a_secret_order_that_stays(
    make_worker: Any, side: ServerSide, tmp_path: Path
) -> None:
    make_worker().about(side.invitation)
    path = federation_folder(tmp_path) / "slots.json"
    kept = json.loads(path.read_text())
    assert sorted(kept) == sorted(f"user-{user}" for user in histories_of("n01"))
    make_worker().about(side.invitation)
    assert json.loads(path.read_text()) == kept
    for place in (path, path.parent, tmp_path / "n01.private"):
        assert stat.S_IMODE(place.stat().st_mode) & 0o077 == 0


def test_another_federation_has_other_slots_and_another_private_folder(
    make_worker: Any, side: ServerSide, tiny: Tiny, tmp_path: Path
) -> None:
    worker = make_worker()
    worker.about(side.invitation)
    other = side_of(tiny, tmp_path, method="custom", seed=1)
    worker.about(other.invitation)
    folders = list((tmp_path / "n01.private" / "federations").iterdir())
    orders = [json.loads((folder / "slots.json").read_text()) for folder in folders]
    assert len(orders) == 2
    assert sorted(orders[0]) == sorted(orders[1])


def test_who_is_forgotten_leaves_no_file_and_takes_part_no_more(
    make_worker: Any, side: ServerSide, ask: Ask, tmp_path: Path
) -> None:
    worker = make_worker()
    worker.about(side.invitation)
    worker.train(ask(tuple(range(8))))
    store = PrivateStore(federation_folder(tmp_path))
    user = next(iter(histories_of("n01")))
    assert worker.forget(ForgetRequest(user=user)) == ForgetReply()
    assert worker.forget(ForgetRequest(user="nobody")) == ForgetReply()
    assert f"user-{user}" not in store.client_ids()
    assert len(store.client_ids()) == 7
    for _ in range(2):
        reply = worker.train(ask(tuple(range(8)), round_number=2))
        assert reply.updates[0].num_clients == 7
        worker = make_worker()
        worker.about(side.invitation)
    whole = b"".join(p.read_bytes() for p in (tmp_path / "n01.private").rglob("*.json"))
    assert f'"user-{user}"'.encode() not in whole


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"data": {"source": "/etc/passwd"}}, "malformed"),
        ({"output": {"dir": "/tmp"}}, "malformed"),
        ({"sead": 1}, "malformed"),
        ({"window": {"item": 1}}, "malformed"),
        ({"backbone": {"name": "smollm2-135m"}}, "not_allowed"),
        ({"items": {"encoder": "/somewhere"}}, "not_allowed"),
        ({"prompt": "/tmp/evil.toml"}, "not_allowed"),
        ({"prompt": "next_item_ratings.v1"}, "model"),
        ({"data": {"min_interactions": 1000}}, "data"),
    ],
)
def test_settings_that_are_wrong_or_not_allowed_are_refused(
    make_worker: Any, side: ServerSide, change: dict[str, Any], code: str
) -> None:
    worker, invitation = make_worker(), side.invitation
    settings = {**(invitation.settings or {}), **change}
    request = invitation.model_copy(update={"settings": settings})
    assert refused(lambda: worker.about(request)) == code
    assert worker.about(AboutRequest()).agreed is None


def test_an_owner_may_pin_the_settings(make_worker: Any, side: ServerSide) -> None:
    backbones = [side.config.backbone.name]
    pinned = {"backbones": backbones, "settings": [side.agreement.settings]}
    assert make_worker(allow=pinned).about(side.invitation).agreed is not None
    other = make_worker(allow={**pinned, "settings": ["0" * 64]})
    assert refused(lambda: other.about(side.invitation)) == NodeRefusal.NOT_ALLOWED


@pytest.mark.parametrize(
    ("call", "header", "body", "code"),
    [
        ("steal", b"{}", b"", "unknown_call"),
        ("about", b"", b"", "malformed"),
        ("about", b"[" * 100_000, b"", "malformed"),
        ("about", b'{"settings": 3}', b"", "malformed"),
        ("about", b'{"other": null}', b"", "malformed"),
        ("train", b"{}", b"", "malformed"),
        ("about", b"{}", b"no tensors", "malformed"),
        ("forget", b'{"user": ""}', b"", "malformed"),
    ],
)
def test_bytes_that_are_no_request_are_refused(
    make_worker: Any, call: str, header: bytes, body: bytes, code: str
) -> None:
    worker = make_worker()
    assert refused(lambda: worker.answer(call, header, body)) == code


def test_an_error_of_any_kind_becomes_a_code(
    make_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()

    def fail(request: AboutRequest) -> None:
        raise ZeroDivisionError("user 42 likes Alien")

    monkeypatch.setattr(worker, "about", fail)
    assert refused(lambda: worker.answer("about", *encode(AboutRequest()))) == "failed"
    answers = LocalLink({"n01": worker}).ask("about", {"n01": AboutRequest()})
    assert str(answers["n01"]) == "the node refused the call: failed"


def test_a_restarted_node_is_invited_again_and_a_missing_one_costs_its_clients_alone(
    make_worker: Any, side: ServerSide, tmp_path: Path, one_process: Processes
) -> None:
    whole = dataclasses.replace(side)
    nodes = {"n01": make_worker()}
    found = federation(whole, LocalLink(nodes), tmp_path / "run", one_process)
    link = LocalLink({"n01": make_worker()})  # it knows no federation
    found.exchange._link = link  # type: ignore[attr-defined]
    cohort = found.server.select_cohort(1)
    assert found.exchange.train(cohort, found.server.broadcast).tally.num_updates == 4
    monkey = lambda call, requests: {}  # noqa: E731
    link.ask = monkey  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"0 of 4 clients are in it, 2 are needed.*no answer"):
        found.exchange.train(cohort, found.server.broadcast)


def test_a_node_that_comes_back_as_another_is_refused_by_the_code_that_says_why(
    make_worker: Any, side: ServerSide, ask: Ask, tmp_path: Path
) -> None:
    titles = [f"Other title {number}" for number in range(30)]
    items = write_items(tmp_path / "other.csv", titles)
    source = str(tmp_path / "n01.csv")
    nodes = {
        "n01": make_worker(),
        "n02": make_worker(allow={"backbones": []}),
        "n03": make_worker(data={"source": source, "items": str(items)}),
    }
    answers = ask_members(side, LocalLink(nodes), "train", dict.fromkeys(nodes, ask()))
    assert isinstance(answers["n01"], TrainReply)
    refusals = [answers["n02"], answers["n03"]]
    assert [one.code for one in refusals if isinstance(one, NodeRefused)] == [
        NodeRefusal.NOT_ALLOWED,
        NodeRefusal.AGREEMENT,
    ]


def test_a_run_does_not_begin_without_one_of_its_nodes(
    make_worker: Any, side: ServerSide, tmp_path: Path, one_process: Processes
) -> None:
    strict = make_worker(allow={"backbones": []})
    with pytest.raises(NodeError, match="n01 cannot take part"):
        federation(side, LocalLink({"n01": strict}), tmp_path / "run", one_process)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"source": "x.csv", "split": "last_fraction"}}, "data.split is the server's"),
        ({"data": {"items": "x.csv"}}, "data.source is missing"),
        ({"min_users_per_figure": 19}, "greater than or equal to 20"),
        ({"socket": {"group": "pfm"}}, "cannot enter the private folder"),
        ({"folders": "x"}, "did you mean folder?"),
    ],
)
def test_a_wrong_site_is_said(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(site_tree(tiny, tmp_path, "n01", **change), SiteConfig, "site.yaml")


def test_paths_of_a_site_are_looked_for_beside_it(tmp_path: Path) -> None:
    (tmp_path / "visits.csv").write_text("user_id,item_id\n")
    text = "data: visits.csv\nfolder: private\nsocket: {path: run/node.sock}\n"
    (tmp_path / "site.yaml").write_text(text)
    site = load_site(tmp_path / "site.yaml")
    assert site.data.source == str(tmp_path / "visits.csv")
    assert site.root == tmp_path / "private"
    assert site.socket_path == tmp_path / "run" / "node.sock"
