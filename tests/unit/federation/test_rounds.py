"""The loop over a toy exchange: what it counts, what it writes down, and what ends it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import TrainingError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.config.schema import parse_config
from pfm_llm.config.settle import settle
from pfm_llm.federation.exchange import Exchange
from pfm_llm.federation.rounds import Federation, resume_from, run_rounds
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.checkpoint import CheckpointStore, RunEnvironment
from pfm_llm.server.server import Server
from tests.support.tables import table_of
from tests.support.tiny import alone

CLIENTS = tuple("abcdefgh")
Answer = Callable[[ClientUpdate], ClientUpdate | None]


class ToyExchange:
    """Clients without a model, as behind a network: each sends its own number.

    Args:
        server: Judges the updates.
        answer: What comes of a client's update on its way; None: nothing arrives.
        counts_missing: Whether silent clients are refused, as an exchange must.
    """

    def __init__(
        self, server: Server, answer: Answer = lambda update: update, counts_missing: bool = True
    ) -> None:
        self.server, self.answer, self.counts_missing = server, answer, counts_missing
        self.diagnostics: Mapping[str, float] = {"slowest_seconds": 2.5}
        self.pruned: list[int] = []
        self.discarded: list[int] = []

    def train(self, cohort: Sequence[str], shared: SharedState) -> Aggregator:
        updates = self.server.new_aggregator()
        for client_id in cohort:
            value = 1e-3 * (1 + CLIENTS.index(client_id))
            delta = {name: torch.full_like(t, value) for name, t in shared.tensors.items()}
            contract, round_number = self.server.contract, shared.round_number + 1
            arrived = self.answer(contract.build(client_id, round_number, 3, 1.0, delta))
            if arrived is not None:
                self.server.receive(updates, arrived)
            elif self.counts_missing:
                updates.refuse(f"client {client_id!r}: no answer within 60 s")
        return updates

    def prune(self, oldest_commit: int) -> None:
        self.pruned.append(oldest_commit)

    def discard_newer(self, round_number: int) -> int:
        self.discarded.append(round_number)
        return 0


def federation_of(folder: Path, **settings: Any) -> tuple[Federation, ToyExchange]:
    tree = {"num_rounds": 4, "cohort_size": 4, **settings}
    given = {
        "name": "toy",
        "head": {"item_met": False, "item_dropout": 0.0},
        "federation": tree,
        "output": {"checkpoint_every": 2},
    }
    config = settle(parse_config(given), len(CLIENTS))
    table = table_of({"lora.m.A": torch.zeros(2, 3), "head.item_bias": torch.zeros(4)})
    contract = table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")
    server = Server(table, contract, CLIENTS, config.federation, seed=0)
    processes, exchange = alone(), ToyExchange(server)
    environment = RunEnvironment.here(
        config_hash="c",
        contract_hash=contract.hash(),
        data_hash="d",
        num_processes=1,
        tokens_per_chunk=1,
        device=processes.device,
    )
    store, log = CheckpointStore(folder / "server"), MetricsLog(folder / "metrics.jsonl")
    seam: Exchange = exchange
    return Federation(config, server, seam, store, environment, log, processes), exchange


def losing(number: int) -> Answer:
    """Drops every answer of the first so many clients."""
    return lambda update: None if update.client_id in CLIENTS[:number] else update


def test_any_exchange_runs_the_rounds(tmp_path: Path) -> None:
    federation, exchange = federation_of(tmp_path)
    committed: list[int] = []
    run_rounds(federation, 1, lambda: {}, committed.append)
    assert committed == [2, 4]
    assert exchange.pruned == [2, 2]  # both commits are kept
    records = federation.metrics_log.read()
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert all(record["slowest_seconds"] == 2.5 for record in records)
    assert not any("stages" in record for record in records)
    assert federation.server.shared.round_number == 4


def test_a_silent_client_that_the_exchange_reports_costs_its_update_alone(tmp_path: Path) -> None:
    federation, exchange = federation_of(tmp_path, cohort_size=8, num_rounds=1)
    exchange.answer = losing(3)
    run_rounds(federation, 1, lambda: {})
    [record] = federation.metrics_log.read()
    assert (record["num_clients"], record["refused"]) == (8, 3)
    assert record["refused_by_reason"] == {"no_answer": 3}


def test_a_round_of_which_a_part_is_missing_does_not_count(tmp_path: Path) -> None:
    federation, exchange = federation_of(tmp_path, cohort_size=8)
    exchange.counts_missing = False

    def lose_two_in_round_3(update: ClientUpdate) -> ClientUpdate | None:
        return losing(2)(update) if update.round_number == 3 else update

    exchange.answer = lose_two_in_round_3
    with pytest.raises(TrainingError, match=r"round 3: of 8 clients 6 sent.*an update: 'a', 'b'\)"):
        run_rounds(federation, 1, lambda: {})
    assert federation.server.shared.round_number == 2
    assert federation.checkpoints.rounds() == (2,)
    assert [record["round"] for record in federation.metrics_log.read()] == [1, 2]

    again, exchange = federation_of(tmp_path, cohort_size=8)
    assert resume_from(again) == 3
    assert exchange.discarded == [2]
    run_rounds(again, 3, lambda: {})
    whole, _ = federation_of(tmp_path / "whole", cohort_size=8)
    run_rounds(whole, 1, lambda: {})
    found, expected = again.server.state_tensors(), whole.server.state_tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def ruined(rounds: range) -> Answer:
    """Makes every update of some rounds useless."""
    return lambda update: (
        dataclasses.replace(update, loss=math.nan) if update.round_number in rounds else update
    )


def test_a_round_without_a_usable_update_changes_nothing_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    federation, exchange = federation_of(tmp_path)
    exchange.answer = ruined(range(2, 4))
    run_rounds(federation, 1, lambda: {})
    records = federation.metrics_log.read()
    assert [record["refused"] for record in records] == [0, 4, 4, 0]
    assert [record.get("refused_by_reason") for record in records] == [
        None,
        {"not_finite": 4},
        {"not_finite": 4},
        None,
    ]
    assert records[1]["loss"] is None
    assert records[1]["aggregated_norm"] == 0
    assert federation.checkpoints.rounds() == (2, 4)
    first = federation_of(tmp_path / "first", num_rounds=1)[0]
    run_rounds(first, 1, lambda: {})
    committed = federation.checkpoints.load(2)
    assert committed is not None
    expected = first.server.state_tensors()
    assert all(torch.equal(committed.tensors[name], expected[name]) for name in expected)


def test_a_run_that_mostly_has_such_rounds_ends_with_the_remedy(tmp_path: Path) -> None:
    federation, exchange = federation_of(tmp_path)
    exchange.answer = ruined(range(2, 5))
    message = r"3 of 4 rounds had no usable update \(client .*loss is nan.*lower the learning rates"
    with pytest.raises(TrainingError, match=message):
        run_rounds(federation, 1, lambda: {})
    assert federation.checkpoints.rounds() == (2,)


def test_a_run_ends_after_twenty_such_rounds(tmp_path: Path) -> None:
    federation, exchange = federation_of(tmp_path, num_rounds=60)
    exchange.answer = ruined(range(5, 61))
    with pytest.raises(TrainingError, match=r"20 of 24 rounds had no usable update"):
        run_rounds(federation, 1, lambda: {})
    assert federation.checkpoints.rounds() == (20, 22)


def test_what_the_stages_did_stands_in_the_record(tmp_path: Path) -> None:
    federation, exchange = federation_of(
        tmp_path, cohort_size=8, num_rounds=1, stages=[{"clip": {"norm": 0.0125}}]
    )

    def one_lies(update: ClientUpdate) -> ClientUpdate:
        if update.client_id != "h":
            return update
        delta = {name: torch.full_like(t, 2.0) for name, t in update.delta.items()}
        return dataclasses.replace(update, delta=delta)

    exchange.answer = one_lies
    run_rounds(federation, 1, lambda: {})
    [record] = federation.metrics_log.read()
    # Of ten equal numbers .001, .002, … .007 the norms are sqrt(10) times that: .0127 from .004.
    assert record["stages"]["clip"]["clipped"] == 5
    assert record["stages"]["clip"]["median_norm"] == pytest.approx(0.0045 * math.sqrt(10))
    assert record["stages"]["clip"]["largest_norm"] == pytest.approx(2 * math.sqrt(10))
    assert record["aggregated_norm"] <= 0.0125
