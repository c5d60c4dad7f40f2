"""Rounds of nodes under masks: the mean is that in the clear, and nothing else leaves a node."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import TrainingError
from pfm_llm.base.processes import Processes
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.federation.nodes import NodesOptions
from pfm_llm.federation.rounds import Federation, run_rounds
from pfm_llm.node import worker
from pfm_llm.node.link import LocalLink
from pfm_llm.node.masking import KEY_FILE, summed
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.masks.words import Words
from pfm_llm.protocol.messages import Message, encode
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.publish.signing import load_key
from pfm_llm.server.aggregation import Aggregator
from tests.support.masks import uniform
from tests.support.nodes import (
    NODES,
    Watched,
    federation,
    histories_of,
    make_site,
    masks_of,
    side_of,
)
from tests.support.tiny import Tiny

COHORT, NORM = 24, 4.0
"""All clients of the three nodes, eight each."""
ERROR = COHORT * NORM / 2**31
SETTINGS: dict[str, Any] = {
    "method": "pfm",
    "federation__cohort_size": COHORT,
    "federation__num_rounds": 2,
    "federation__stages": [{"clip": {"norm": NORM}}],
}
STEPS = ("advertise", "share", "mask", "confirm", "reveal")


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path, one_process: Processes) -> Callable[..., Worker]:
    """Starts a worker that knows the keys of the others."""

    def make(node: str, nodes: Sequence[str] = NODES, **site: Any) -> Worker:
        given = {"masks": masks_of(tmp_path, nodes)[node], **site}
        return Worker(make_site(tiny, tmp_path, node, **given), one_process)

    return make


@pytest.fixture
def link(start: Callable[..., Worker]) -> Watched:
    return Watched({node: start(node) for node in NODES})


@pytest.fixture
def begin(tiny: Tiny, tmp_path: Path, one_process: Processes) -> Callable[..., Federation]:
    """The loop over some nodes, with masks or without."""

    def make(link: LocalLink, masks: Any = True, **settings: Any) -> Federation:
        side = side_of(tiny, tmp_path, **{**SETTINGS, **settings}, federation__masks=masks)
        return federation(side, link, tmp_path / f"run-{bool(masks)}", one_process)

    return make


def first_round(found: Federation) -> Aggregator:
    return found.exchange.train(found.server.select_cohort(1), found.server.broadcast)


def largest_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def clear_nodes(tiny: Tiny, folder: Path, processes: Processes) -> Watched:
    """The same nodes without masks, each with one order of slots for both federations."""
    link = Watched({n: Worker(make_site(tiny, folder, n), processes) for n in NODES})
    return link


@pytest.mark.parametrize("weighting", ["uniform", "num_examples"])
def test_the_mean_is_that_of_sums_in_the_clear(
    link: Watched, begin: Any, tiny: Tiny, tmp_path: Path, one_process: Processes, weighting: str
) -> None:
    given = {"federation__server__weighting": weighting}
    masks: Any = {"max_examples": 64} if weighting == "num_examples" else True
    found = begin(link, masks, **given)
    masked = first_round(found)
    plain = first_round(begin(clear_nodes(tiny, tmp_path, one_process), False, **given))
    expected = plain.result()
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e4 * ERROR
    most = 64 * COHORT / plain.tally.num_examples if weighting == "num_examples" else 1.0
    assert largest_difference(masked.result(), expected) <= most * ERROR + 2**-22 * NORM
    assert masked.tally.num_updates == plain.tally.num_updates == COHORT
    assert masked.tally.num_examples == plain.tally.num_examples
    assert masked.tally.total_weight == plain.tally.total_weight
    assert masked.tally.loss == pytest.approx(plain.tally.loss, abs=1e-3)
    assert sorted(masked.tally.client_ids) == sorted(plain.tally.client_ids)
    figures, size = found.exchange.diagnostics, found.server.table.num_bytes
    assert figures["nodes"] == 3
    assert 3 * size < figures["bytes_up"] < 3 * size + 12_000
    assert 3 * size < figures["bytes_down"] < 3 * size + 12_000
    assert [call for call, node, *_ in link.passed if node == "n01"] == ["about", *STEPS]


@pytest.mark.parametrize("step", STEPS)
def test_one_node_may_drop_out_at_any_step(
    link: Watched, begin: Any, tiny: Tiny, tmp_path: Path, one_process: Processes, step: str
) -> None:
    found = begin(link)
    link.lost.add((step, "n03"))
    masked = first_round(found)
    is_in = step in ("confirm", "reveal")  # its words have arrived
    assert masked.tally.num_updates == (COHORT if is_in else 16)
    assert dict(masked.tally.reasons) == ({} if is_in else {"no_answer": 8})
    left = clear_nodes(tiny, tmp_path, one_process)
    plain = begin(left, False)
    if not is_in:
        left.lost.add(("train", "n03"))
    expected = first_round(plain).result()
    assert largest_difference(masked.result(), expected) <= 2 * ERROR + 2**-24 * NORM
    found.server.aggregate(masked)
    link.lost.clear()
    again = found.exchange.train(found.server.select_cohort(2), found.server.broadcast)
    assert again.tally.num_updates == COHORT


def test_a_round_that_loses_more_than_a_third_does_not_count(link: Watched, begin: Any) -> None:
    found = begin(link)
    link.lost |= {("mask", "n02"), ("mask", "n03")}
    with pytest.raises(TrainingError, match=r"round 1: .*1 of 3 clients.*n02.*mask: no answer"):
        first_round(found)
    assert found.server.round_under_way == 1
    assert "confirm" not in {call for call, *_ in link.passed}
    link.lost.clear()
    assert first_round(found).tally.num_updates == COHORT  # with fresh keys, for the same slots


def test_a_round_below_the_quorum_does_not_count(
    link: Watched, tiny: Tiny, tmp_path: Path, one_process: Processes
) -> None:
    side = side_of(tiny, tmp_path, **SETTINGS, federation__masks=True)
    found = federation(side, link, tmp_path / "run", one_process, NodesOptions(quorum=0.9))
    link.lost.add(("share", "n01"))
    with pytest.raises(TrainingError, match="16 of 24 clients are in it, 22 are needed"):
        first_round(found)


def test_a_node_that_is_restarted_within_a_round_has_dropped_out_of_it(
    link: Watched, begin: Any, start: Any
) -> None:
    found = begin(link)

    def restart(call: str, node: str, answer: Any) -> Any:
        if (call, node) == ("share", "n02"):
            link.workers["n02"] = start("n02")
        return answer

    link.change = restart
    masked = first_round(found)
    assert masked.tally.num_updates == 16
    assert dict(masked.tally.reasons) == {NodeRefusal.NOT_READY: 8}
    # At the next beginning it is invited again.
    link.change = lambda call, node, answer: answer
    found.server.aggregate(masked)
    again = found.exchange.train(found.server.select_cohort(2), found.server.broadcast)
    assert again.tally.num_updates == COHORT


def test_the_loop_runs_under_masks_and_ends_where_it_ends_in_the_clear(
    link: Watched, begin: Any, tiny: Tiny, tmp_path: Path, one_process: Processes
) -> None:
    given = {"federation__server__optimizer": "average"}
    masked = begin(link, **given)
    run_rounds(masked, 1, lambda: {})
    plain = begin(clear_nodes(tiny, tmp_path, one_process), False, **given)
    run_rounds(plain, 1, lambda: {})
    ends = masked.server.shared.tensors, plain.server.shared.tensors
    assert largest_difference(*ends) <= 1e-5
    assert [record["nodes"] for record in masked.metrics_log.read()] == [3, 3]


def test_clients_without_an_update_are_left_out_and_too_few_are_refused(
    link: Watched, begin: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = LocalTrainer.train_chunk
    lost = sorted(histories_of("n01"))[:2]

    def diverging(self: Any, chunk: Sequence[str], shared: SharedState) -> list[ClientUpdate]:
        return [
            dataclasses.replace(update, delta={n: t + 9 * NORM for n, t in update.delta.items()})
            if update.client_id.removeprefix("user-") in lost
            else update
            for update in train(self, chunk, shared)
        ]

    monkeypatch.setattr(LocalTrainer, "train_chunk", diverging)
    found = begin(link)
    masked = first_round(found)
    assert masked.tally.num_updates == COHORT - 2
    assert dict(masked.tally.reasons) == {"no_answer": 2}
    assert link.answers("mask")["n01"].num_clients == 6
    link.workers["n01"] = start("n01", min_users_per_sum=7)
    masked = first_round(found)
    assert dict(masked.tally.reasons) == {NodeRefusal.TOO_FEW: 8}


def test_what_leaves_a_node_is_uniform_words_keys_and_one_number(
    link: Watched, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[Words] = []  # in the order of the nodes

    def watched(*args: Any) -> Any:
        words, clients = summed(*args)
        plain.append(words.copy())
        return words, clients

    monkeypatch.setattr(worker, "summed", watched)
    first_round(begin(link))
    replies = link.answers("mask")
    for own, (node, reply) in zip(plain, replies.items(), strict=True):
        assert reply.tensors.keys() == {"words"}
        assert json.loads(encode(reply)[0]) == {
            "round_number": 1,
            "contract_hash": reply.contract_hash,
            "num_clients": 8,
        }
        words = reply.update(node).words
        assert uniform(own) < 1e-9  # which the test tells from uniform
        assert 1e-9 < uniform(words) < 1 - 1e-9
        assert float((words == own).mean()) < 1e-3
    whole = [reply.update(node).words for node, reply in replies.items()]
    # With the seeds of the nodes, which they reveal at the end.
    assert uniform(np.sum(whole, 0, dtype=np.uint32)) > 1e-9
    assert uniform(np.sum(plain, 0, dtype=np.uint32)) < 1e-9
    answers = [answer for *_, answer in link.passed if isinstance(answer, Message)]
    everything = b"".join(b"".join(encode(answer)) for answer in answers)
    assert str(tmp_path).encode() not in everything
    assert b"user-" not in everything
    for node in NODES:
        assert not any(f'"{user}"'.encode() in everything for user in histories_of(node))
        key = (tmp_path / f"{node}.private" / KEY_FILE).read_bytes()
        secret = load_key(tmp_path / f"{node}.private" / KEY_FILE).private_bytes_raw()
        assert key.splitlines()[1] not in everything
        assert secret.hex().encode() not in everything
