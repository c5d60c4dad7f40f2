"""Rounds of a federation under attack, and what is left of its quality."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.attacking.attacks import Attack
from pfm_llm.base.progress import Progress
from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.config.schema import FederationConfig
from pfm_llm.config.settle import known
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation.personality.estimates import user_quality
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.protocol.types import ClientUpdate, Mode, SharedState, Tensors
from pfm_llm.runs.measuring import evaluation_task, measure
from pfm_llm.runs.run import Run
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.norm_bound import NormBound
from pfm_llm.server.server import Server


@dataclass(frozen=True)
class Defence:
    """How a server meets hostile clients.

    Attributes:
        settings: Of ``federation``, over those of the run.
        bounded: Whether `NormBound` is on, as it is in all runs of the library.
    """

    settings: Mapping[str, Any]
    bounded: bool = True


class _Unbounded(NormBound):
    """Learns sizes and bounds nothing."""

    def bounded(
        self, client_id: str, delta: Tensors, num_examples: int
    ) -> tuple[Tensors, torch.Tensor]:
        return delta, self._sizes(delta, num_examples)


class AttackedServer(Server):
    """A server to which some clients send something else than they have trained.

    Attributes:
        attack: What they send; None: what they have trained.
    """

    attack: Attack | None = None

    def receive(self, updates: Aggregator, update: ClientUpdate) -> bool:
        """See `Server.receive`; the update arrives as the attack has it."""
        if self.attack is not None:
            update = self.attack.sent(update, self.shared)
        return super().receive(updates, update)

    def bound_nothing(self) -> None:
        """Take the bound on sizes away."""
        self._bound = _Unbounded(self.contract.tensors, self._config.local)


@dataclass(frozen=True)
class Outcome:
    """The end of the rounds.

    Attributes:
        shared: The shared state after them.
        refused: Number of refused updates.
        clipped: Number of updates at or above the length of a clip.
        bounded: Number of updates that the bound has scaled down.
        norms: Quantiles of the norms of a round's updates, each the median over rounds.
    """

    shared: SharedState
    refused: int
    clipped: int
    bounded: int
    norms: dict[str, float]


def play(run: Run, defence: Defence, attack: Attack | None, name: str) -> Outcome:
    """All rounds of a federation, from its start.

    Args:
        run: The assembled run; its clients keep nothing from round to round.
        defence: Of the server.
        attack: None: nobody is hostile.
        name: Of the two, for the progress.
    """
    given = run.config.federation.model_dump(mode="json")
    server_settings = {**given["server"], **defence.settings.get("server", {})}
    federation = FederationConfig.model_validate(
        {**given, **defence.settings, "server": server_settings}
    )
    model, clients, config = run.model, run.clients, run.config
    server = AttackedServer(
        model.table, model.contract, clients.histories.trainable, federation, config.seed,
        model.shared,
    )  # fmt: skip
    server.attack = attack
    if not defence.bounded:
        server.bound_nothing()
    exchange = LocalExchange(server, clients.trainer, clients.store, run.processes)
    rounds = known(federation.num_rounds)
    summaries = []
    with Progress(rounds, name, unit="rounds") as progress:
        for round_number in range(1, rounds + 1):
            cohort = server.select_cohort(round_number)
            summaries.append(server.aggregate(exchange.train(cohort, server.broadcast)))
            progress.update(1)
    quantiles = [one.norm_quantiles for one in summaries if one.norm_quantiles]
    return Outcome(
        shared=server.shared,
        refused=sum(len(one.refusals) for one in summaries),
        clipped=sum(int(one.stages.get("clip", {}).get("clipped", 0)) for one in summaries),
        bounded=sum(one.num_clipped for one in summaries),
        norms={key: float(np.median([one[key] for one in quantiles])) for key in quantiles[0]},
    )


def quality(run: Run, shared: SharedState, held_out: HeldOut) -> np.ndarray:
    """NDCG@10 of each user over the full catalogue, float64 [U], by the shared part alone."""
    ranks = _ranks(run, shared, held_out)
    return user_quality("ndcg", ranks, np.arange(len(ranks)), HEADLINE_K)


def ranks_of_item(run: Run, shared: SharedState, held_out: HeldOut, item: int) -> np.ndarray:
    """The rank of one item for each user who has not met it, int64 [users], from 1."""
    others = [
        query
        for query, history in enumerate(held_out.histories)
        if item not in history and item not in held_out.targets[query]
    ]
    asked = held_out.take(others)
    targets = tuple(np.array([item], dtype=np.int32) for _ in others)
    return _ranks(run, shared, dataclasses.replace(asked, targets=targets))


def _ranks(run: Run, shared: SharedState, held_out: HeldOut) -> np.ndarray:
    task = evaluation_task(run, run.as_set(shared), held_out, [Mode.SHARED_ONLY])
    ranks = measure(run, task).ranks[Mode.SHARED_ONLY]
    return ranks.full[np.argsort(ranks.users, kind="stable")]
