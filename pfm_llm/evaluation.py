"""Ranking held-out items, honestly: full catalogue, seen items masked, ties against us.

Everything is fitted on train. Before the private adapter is measured, every evaluated client
takes ``personalise_steps`` on it from the shared state at hand, on its own training history,
whether it ever was in a cohort or not. At test every method sees train and validation as input
history; nothing is refitted.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm import metrics, scoring
from pfm_llm.baselines import FittedBaseline
from pfm_llm.client import ClientHistories, LocalTrainer, plan_chunks
from pfm_llm.cohort_model import ChunkBatch, CohortModel, Parts, collate
from pfm_llm.config import EvaluationConfig
from pfm_llm.data.splits import HeldOut
from pfm_llm.encoding import HistoryEncoder, Window
from pfm_llm.private_store import PrivateStore
from pfm_llm.run_report import ResultRow
from pfm_llm.seeding import numpy_generator
from pfm_llm.trunk_cache import TrunkCache
from pfm_llm.types import Mode, PrivateState, SharedState

FULL = "full"
METRICS: dict[str, type[metrics.RankMetric]] = {
    "ndcg": metrics.Ndcg,
    "hit_rate": metrics.HitRate,
    "mrr": metrics.Mrr,
}
OUR_MODES = (Mode.ZERO_SHOT, Mode.SHARED_ONLY, Mode.PRIVATE_ONLY, Mode.SHARED_PRIVATE)


@dataclass(frozen=True)
class Ranks:
    """Ranks of all targets of some queries, from 1.

    Attributes:
        users: int64 [T], whose target each is.
        full: int64 [T], rank among the full catalogue without seen items.
        sampled: int64 [T], rank among the target and its sampled negatives.
    """

    users: np.ndarray
    full: np.ndarray
    sampled: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What one evaluation found.

    Attributes:
        ranks: Per mode.
        num_personalised: Users whose private adapter is not zero.
        num_users: Users evaluated.
        private_steps: Private gradient steps that were taken for it, over all clients.
    """

    ranks: Mapping[Mode, Ranks]
    num_personalised: int
    num_users: int
    private_steps: int


@dataclass(frozen=True)
class EvaluationTask:
    """What to rank with what.

    Attributes:
        held_out: All queries.
        negatives: From `candidates.sample_negatives` for ``held_out``.
        shared: The shared state at hand.
        round_number: After which round it stands.
        parts: Per mode which adapters take part; None for zero-shot.
        keep: Store the personalised adapters with their clients, for serving.
    """

    held_out: HeldOut
    negatives: np.ndarray
    shared: SharedState
    round_number: int
    parts: Mapping[Mode, Parts | None]
    keep: bool = False

    @property
    def uses_private(self) -> bool:
        """Whether a private adapter takes part in any mode."""
        return any(parts is not None and parts.private_weight for parts in self.parts.values())

    @functools.cached_property
    def query_of(self) -> Mapping[int, int]:
        """User to index of the query in ``held_out``."""
        return {int(user): index for index, user in enumerate(self.held_out.users)}


@dataclass(frozen=True)
class ChunkRanks:
    """What one chunk of clients contributes; see `Measured`."""

    ranks: Mapping[Mode, Ranks]
    num_personalised: int
    private_steps: int


class Evaluator:
    """Ranks the held-out items of clients with our model in its modes.

    Args:
        model: The many-clients model.
        trainer: For personalisation.
        histories: The clients and their training windows.
        encoder: Renders queries.
        cache: Trunk states of queries; they too stay with the client.
        store: The clients' private folders.
    """

    def __init__(
        self,
        model: CohortModel,
        trainer: LocalTrainer,
        histories: ClientHistories,
        encoder: HistoryEncoder,
        cache: TrunkCache,
        store: PrivateStore,
    ) -> None:
        self._model = model
        self._trainer = trainer
        self._histories = histories
        self._encoder = encoder
        self._cache = cache
        self._store = store

    def chunks(self, task: EvaluationTask, tokens_per_chunk: int) -> list[tuple[str, ...]]:
        """The clients to evaluate, grouped; equal on every process."""
        clients = {self._histories.client_of(int(user)) for user in task.held_out.users}

        def num_tokens(client_id: str) -> int:
            lengths = [len(window.tokens) for _, window in self._queries(client_id, task)]
            return max(self._trainer.personalise_tokens(client_id), len(lengths) * max(lengths))

        return plan_chunks(clients, num_tokens, tokens_per_chunk)

    def rank_chunk(self, chunk: Sequence[str], task: EvaluationTask) -> ChunkRanks:
        """Rank the targets of some clients' users; queries of other clients are passed over."""
        queries = [self._queries(client_id, task) for client_id in chunk]
        batch = self._collate(chunk, [[window for _, window in own] for own in queries])
        private: dict[str, torch.Tensor] = {}
        if task.uses_private:
            private = self._trainer.personalise(chunk, task.shared, task.round_number)
            if task.keep:
                self._keep(chunk, private, task.round_number)
        stacked = self._trainer.stack(task.shared, private, len(chunk))
        order = [index for own in queries for index, _ in own]
        ranks = {}
        for mode, parts in task.parts.items():
            scores = (
                self._model.zero_shot_scores(batch)
                if parts is None
                else self._model.scores(batch, stacked, parts)
            )
            ranks[mode] = rank_scores(scores.cpu().numpy(), task.held_out, order, task.negatives)
        return ChunkRanks(
            ranks=ranks,
            num_personalised=_count_non_zero(private, [len(own) for own in queries]),
            private_steps=self._trainer.personalise_steps(chunk) if private else 0,
        )

    def _queries(self, client_id: str, task: EvaluationTask) -> list[tuple[int, Window]]:
        """A client's queries: index in ``held_out``, and window."""
        histories, ratings = task.held_out.histories, task.held_out.history_ratings
        users = self._histories.clients[client_id].users
        indices = [task.query_of[user] for user in users if user in task.query_of]
        return [
            (q, self._encoder.query_window(histories[q], ratings[q] if ratings else None))
            for q in indices
        ]

    def _collate(self, chunk: Sequence[str], windows: Sequence[Sequence[Window]]) -> ChunkBatch:
        # A query is a cache entry of its own: it stays when the user's other queries change.
        states = [
            [self._cache.states([window], client_id)[0] for window in own]
            for client_id, own in zip(chunk, windows, strict=True)
        ]
        return collate(windows, states, last_only=True)

    def _keep(
        self, chunk: Sequence[str], private: Mapping[str, torch.Tensor], round_number: int
    ) -> None:
        for c, client_id in enumerate(chunk):
            tensors = {name: value[c].cpu() for name, value in private.items()}
            self._store.save_personalised(PrivateState(client_id, round_number, tensors))


def parts_of(modes: Sequence[Mode], private_weight: float) -> dict[Mode, Parts | None]:
    """Which adapters take part in each mode; None for zero-shot.

    Args:
        modes: Some of `OUR_MODES`.
        private_weight: Factor on the private adapter where it is on.
    """
    table: dict[Mode, Parts | None] = {
        Mode.ZERO_SHOT: None,
        Mode.SHARED_ONLY: Parts(shared_lora=True, private_weight=0.0),
        Mode.PRIVATE_ONLY: Parts(shared_lora=False, private_weight=private_weight),
        Mode.SHARED_PRIVATE: Parts(shared_lora=True, private_weight=private_weight),
    }
    return {mode: table[mode] for mode in modes}


def combine(parts: Sequence[ChunkRanks]) -> Measured:
    """Put the parts of all chunks together."""
    modes = list(parts[0].ranks) if parts else []
    ranks = {mode: _concatenate([part.ranks[mode] for part in parts]) for mode in modes}
    num_users = len(np.unique(next(iter(ranks.values())).users)) if ranks else 0
    return Measured(
        ranks=ranks,
        num_personalised=sum(part.num_personalised for part in parts),
        num_users=num_users,
        private_steps=sum(part.private_steps for part in parts),
    )


def rank_scores(
    scores: np.ndarray, held_out: HeldOut, queries: Sequence[int], negatives: np.ndarray
) -> Ranks:
    """Rank the targets of some queries.

    Args:
        scores: float [Q, I], a row per query.
        held_out: Where the queries are from.
        queries: int [Q], their indices in it.
        negatives: int [all targets of ``held_out``, num_negatives].
    """
    histories = [held_out.histories[q] for q in queries]
    targets = [held_out.targets[q] for q in queries]
    starts = np.concatenate([[0], np.cumsum([len(t) for t in held_out.targets])])
    rows = np.concatenate([np.arange(starts[q], starts[q + 1]) for q in queries])
    users = np.concatenate([np.full(len(held_out.targets[q]), held_out.users[q]) for q in queries])
    return Ranks(
        users=users.astype(np.int64),
        full=scoring.full_ranks(scores, histories, targets),
        sampled=scoring.sampled_ranks(scores, targets, negatives[rows]),
    )


def rank_baseline(
    baseline: FittedBaseline, held_out: HeldOut, negatives: np.ndarray, batch: int = 1024
) -> Ranks:
    """Rank all targets with a baseline."""
    parts = []
    for start in range(0, len(held_out.users), batch):
        queries = range(start, min(start + batch, len(held_out.users)))
        scores = baseline.score([held_out.histories[q] for q in queries])
        parts.append(rank_scores(np.asarray(scores), held_out, queries, negatives))
    return _concatenate(parts)


def sample_users(held_out: HeldOut, max_users: int | None, seed: int) -> HeldOut:
    """A fixed random sample of the queries; all of them when ``max_users`` is None."""
    count = len(held_out.users)
    if max_users is None or max_users >= count:
        return held_out
    generator = numpy_generator(seed, f"evaluated users/{held_out.name}")
    kept = np.sort(generator.choice(count, max_users, replace=False))
    ratings = held_out.history_ratings
    return dataclasses.replace(
        held_out,
        users=held_out.users[kept],
        histories=tuple(held_out.histories[q] for q in kept),
        history_ratings=tuple(ratings[q] for q in kept) if ratings else None,
        targets=tuple(held_out.targets[q] for q in kept),
    )


def headline(ranks: Ranks, k: int = 10) -> dict[str, float]:
    """NDCG and hit rate at k over the full catalogue, for the log of a run."""
    figures: dict[str, float] = {}
    for metric in (metrics.Ndcg(k), metrics.HitRate(k)):
        figures |= metric.compute(ranks=ranks.full, groups=ranks.users) or {}
    return figures


def result_rows(
    ranks: Ranks, describe: Callable[..., ResultRow], config: EvaluationConfig, seed: int
) -> list[ResultRow]:
    """Rows for ``results.json``: every metric, k and set of candidates, with intervals.

    Args:
        ranks: What was measured.
        describe: Makes a row from ``candidates, metric, k, value, ci_low, ci_high, num_users``.
        config: Cut-offs and bootstrap.
        seed: The experiment's seed.
    """
    rows = []
    for candidates, values in (
        (FULL, ranks.full),
        (f"sampled{config.num_negatives}", ranks.sampled),
    ):
        for name, metric in METRICS.items():
            for k in config.ks:
                computed = metric(k).compute(ranks=values, groups=ranks.users)
                assert computed is not None
                own, users = metrics.per_user(metrics.RANK_METRICS[name](values, k), ranks.users)
                low, high = metrics.bootstrap_interval(
                    own, config.bootstrap, config.confidence, seed
                )
                rows.append(
                    describe(
                        candidates=candidates,
                        metric=name,
                        k=k,
                        value=computed[f"{name}@{k}"],
                        ci_low=low,
                        ci_high=high,
                        num_users=len(users),
                    )
                )
    return rows


def _concatenate(parts: Sequence[Ranks]) -> Ranks:
    users = np.concatenate([part.users for part in parts])
    # By user, so that the result does not depend on how the work was divided.
    order = np.argsort(users, kind="stable")
    return Ranks(
        users=users[order],
        full=np.concatenate([part.full for part in parts])[order],
        sampled=np.concatenate([part.sampled for part in parts])[order],
    )


def _count_non_zero(private: Mapping[str, torch.Tensor], users: Sequence[int]) -> int:
    changes = [value.flatten(1).ne(0).any(1) for n, value in private.items() if n.endswith(".B")]
    if not changes:
        return 0
    active = torch.stack(changes).any(0).tolist()
    return sum(count for count, is_active in zip(users, active, strict=True) if is_active)
