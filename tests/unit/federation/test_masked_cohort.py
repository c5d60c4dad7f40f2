"""A cohort under masks trains what a cohort in the clear trains, to the step of the fixed point."""

import dataclasses
import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import ConfigError
from pfm_llm.client.masked_client import MaskedClient
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.federation.rounds import Federation, run_rounds
from pfm_llm.protocol.masks.messages import MaskedUpdate
from pfm_llm.protocol.masks.words import FixedPoint, Words
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.runs.experiment import make_federation
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.masked_round import MaskedRound
from pfm_llm.server.server import Server
from tests.conftest import TinyRun

COHORT, NORM = 8, 4.0
ROUNDS = 3
ERROR = COHORT * NORM / 2**31
"""As `FixedPoint` states it, of each number of a mean with uniform weights."""

SETTINGS: dict[str, Any] = {
    "federation__cohort_size": COHORT,
    "federation__num_rounds": ROUNDS,
    "federation__stages": [{"clip": {"norm": NORM}}],
    "output__checkpoint_every": 1,
}


def federation_of(tiny_run: TinyRun, masks: Any = True, **settings: Any) -> Federation:
    return make_federation(tiny_run(**SETTINGS, federation__masks=masks, **settings))


def first_round(federation: Federation) -> Aggregator:
    server = federation.server
    return federation.exchange.train(server.select_cohort(1), server.broadcast)


def largest_difference(found: Any, expected: Any) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def run(federation: Federation) -> list[dict[str, Any]]:
    run_rounds(federation, 1, lambda: {})
    return federation.metrics_log.read()


@pytest.mark.parametrize("dropouts", [0.0, 0.3])
def test_the_mean_is_that_of_updates_in_the_clear(tiny_run: TinyRun, dropouts: float) -> None:
    given = {"federation__simulated_dropouts": dropouts}
    plain, masked = (
        first_round(federation_of(tiny_run, masks, **given)) for masks in (False, True)
    )
    expected = plain.result()
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e5 * ERROR
    # Rounding the mean to float32 adds what it adds in the clear.
    assert largest_difference(masked.result(), expected) <= ERROR + 2**-24 * NORM
    left = COHORT - math.floor(dropouts * COHORT)
    assert masked.tally.num_updates == plain.tally.num_updates == left
    assert sorted(masked.tally.client_ids) == sorted(plain.tally.client_ids)
    assert masked.tally.num_examples == plain.tally.num_examples
    assert masked.tally.loss == pytest.approx(plain.tally.loss, abs=1e-4)
    assert masked.tally.reasons == plain.tally.reasons
    assert masked.tally.reasons.total() == COHORT - left


def test_weights_are_numbers_of_examples_if_these_are_to_count(tiny_run: TinyRun) -> None:
    given = {"federation__server__weighting": "num_examples"}
    plain = first_round(federation_of(tiny_run, False, **given))
    masked = first_round(federation_of(tiny_run, {"max_examples": 64}, **given))
    assert masked.tally.total_weight == plain.tally.total_weight == plain.tally.num_examples
    mean = plain.tally.num_examples / COHORT
    bound = ERROR * 64 / mean + 2**-22 * NORM
    assert largest_difference(masked.result(), plain.result()) <= bound
    assert masked.tally.loss == pytest.approx(plain.tally.loss, abs=1e-3)
    # An example counts as far as `max_examples`, for all clients alike.
    few = first_round(federation_of(tiny_run, {"max_examples": 1}, **given))
    assert few.tally.total_weight == COHORT


def test_a_whole_run_ends_where_one_in_the_clear_ends(tiny_run: TinyRun) -> None:
    given = {"federation__server__optimizer": "average", "federation__local__shared_lr": 0.01}
    ends = []
    for masks in (False, True):
        federation = federation_of(tiny_run, masks, **given)
        start = federation.server.shared.tensors
        records = run(federation)
        assert [record["refused"] for record in records] == [0] * ROUNDS
        assert all(("mask_seconds" in record) is masks for record in records)
        assert any("aggregation_error" in record for record in records) is not masks
        ends.append(federation.server.shared.tensors)
    moved = largest_difference(ends[0], start)
    assert moved > 1e4 * ERROR
    assert largest_difference(ends[1], ends[0]) <= 2 * ROUNDS * ERROR  # at learning rates of 1


def test_fresh_keys_change_no_bit_of_the_sum(tiny_run: TinyRun) -> None:
    first, second = (first_round(federation_of(tiny_run)).result() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_who_has_no_finite_update_sends_none(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federation_of(tiny_run)
    lost = federation.server.select_cohort(1)[2]
    train = LocalTrainer.train_chunk

    def diverging(self: Any, chunk: Sequence[str], shared: SharedState) -> list[ClientUpdate]:
        return [
            dataclasses.replace(update, loss=math.nan) if update.client_id == lost else update
            for update in train(self, chunk, shared)
        ]

    monkeypatch.setattr(LocalTrainer, "train_chunk", diverging)
    updates = first_round(federation)
    assert lost not in updates.tally.client_ids
    assert updates.tally.num_updates == COHORT - 1
    assert dict(updates.tally.reasons) == {"not_finite": 1}
    assert lost in updates.tally.refusals[0]


def test_a_round_whose_masks_stay_on_is_lost_and_the_run_goes_on(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federation_of(tiny_run)
    server = federation.server
    absent = frozenset(server.select_cohort(2)[:3])  # more than a third of eight
    monkeypatch.setattr(
        Server, "simulated_dropouts", lambda _, number: absent if number == 2 else frozenset()
    )
    states = {}
    step = Server.aggregate

    def watched(self: Server, updates: Aggregator) -> Any:
        summary = step(self, updates)
        states[summary.round_number] = dict(self.shared.tensors)
        return summary

    monkeypatch.setattr(Server, "aggregate", watched)
    records = run(federation)
    assert [record["refused"] for record in records] == [0, COHORT, 0]
    assert records[1]["refused_by_reason"] == {"masked": 5, "no_answer": 3}
    assert largest_difference(states[2], states[1]) == 0 < largest_difference(states[3], states[2])


def test_a_sum_that_cannot_be_is_lost_with_its_reason(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client sends what is beyond the bound: nobody can tell which."""
    federation, encode = federation_of(tiny_run), FixedPoint.encode
    hostile = federation.server.select_cohort(1)[0]

    def too_long(self: FixedPoint, update: ClientUpdate) -> Words:
        words = encode(self, update)
        if update.client_id == hostile:
            words[:100] = 2**30
        return words

    monkeypatch.setattr(FixedPoint, "encode", too_long)
    updates = first_round(federation)
    assert updates.tally.num_updates == 0
    assert dict(updates.tally.reasons) == {"too_large": COHORT}


def test_the_server_gets_no_update_in_the_clear(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that clients send, word by word: no word of an update is where it was."""
    sent: list[Any] = []
    plain: dict[str, Words] = {}
    encode, add = FixedPoint.encode, MaskedRound.add

    def encoded(self: FixedPoint, update: ClientUpdate) -> Words:
        plain[update.client_id] = encode(self, update).copy()
        return plain[update.client_id].copy()

    def added(self: MaskedRound, update: MaskedUpdate) -> None:
        sent.append(update)
        add(self, update)

    def never(*_: Any) -> bool:
        raise AssertionError("a single update reached the server")

    monkeypatch.setattr(FixedPoint, "encode", encoded)
    monkeypatch.setattr(MaskedRound, "add", added)
    monkeypatch.setattr(Server, "receive", never)
    for step in ("advertise", "share", "confirm", "reveal"):

        def told(self: MaskedClient, *args: Any, step: str = step) -> Any:
            message = ORIGINAL[step](self, *args)
            sent.append(message)
            return message

        monkeypatch.setattr(MaskedClient, step, told)
    first_round(federation_of(tiny_run))
    updates = [message for message in sent if isinstance(message, MaskedUpdate)]
    assert len(updates) == len(plain) == COHORT
    assert len(sent) == 5 * COHORT
    for update in updates:
        own = plain[update.client_id]
        assert float((update.words == own).mean()) < 1e-3
        assert len(update.words) == len(own)
    # Numbers that are 0 in many updates are 0 in none that was sent.
    assert all(float((own == 0).mean()) > 0.05 for own in plain.values())
    assert all(float((update.words == 0).mean()) < 1e-3 for update in updates)
    everything = b"".join(pickle.dumps(message) for message in sent)
    for own in plain.values():
        longest = own[(own != 0).nonzero()[0][:1][0] :][:16]
        assert longest.tobytes() not in everything


ORIGINAL = {
    step: getattr(MaskedClient, step) for step in ("advertise", "share", "confirm", "reveal")
}


def test_the_aggregation_error_cannot_be_measured_under_masks(tiny_run: TinyRun) -> None:
    run = tiny_run(**SETTINGS, federation__masks=True)
    server, clients = run.new_server(), run.clients
    with pytest.raises(ConfigError, match=r"needs single updates, which federation\.masks"):
        LocalExchange(server, clients.trainer, clients.store, run.processes, measure_error=True)
    with pytest.raises(ConfigError, match=r"in the clear; set federation\.masks"):
        tiny_run(**SETTINGS).new_server().new_masked_round({})


def test_a_client_keeps_its_long_term_key_from_round_to_round(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, keys = federation_of(tiny_run), []
    opening = Server.new_masked_round

    def opened(self: Server, verify_keys: Mapping[str, bytes]) -> MaskedRound:
        keys.append(verify_keys)
        return opening(self, verify_keys)

    monkeypatch.setattr(Server, "new_masked_round", opened)
    for _ in range(2):  # the same cohort twice
        first_round(federation)
    assert keys[0] == keys[1]
    assert keys[0].keys() == set(federation.server.select_cohort(1))
    assert len(set(keys[0].values())) == COHORT
