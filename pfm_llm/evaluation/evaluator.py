"""Ranking held-out items, honestly: full catalogue, seen items masked, ties against us.

Everything is fitted on train. A private part that takes no steps is a function of the history that
a query shows, as are the scores of every method. Before a part that takes steps is measured, every
client takes ``personalise_steps`` on it from the current shared state, on its own training
history, whether it ever was in a cohort or not. At test every method sees train and validation as
input history; nothing is refitted.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer, plan_chunks
from pfm_llm.data.history import History
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import metrics, scoring
from pfm_llm.evaluation.ranking import Ranks, concatenate, rank_scores
from pfm_llm.evaluation.scorer import Scorer, UserVectors
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import Mode, PrivateState, SharedState

_MOST_QUERIES = 256
"""Users of one silo that are scored together."""

OUR_MODES = (Mode.ZERO_SHOT, Mode.SHARED_ONLY, Mode.PRIVATE_ONLY, Mode.SHARED_PRIVATE)


@dataclass(frozen=True)
class Measured:
    """The figures of some clients' users: of one chunk, or from `combine` of all.

    Attributes:
        ranks: The ranks of the targets per mode.
        users: The user of each query, int64 [Q]; ascending after `combine`.
        aucs: Per mode the AUC of likes of each of ``users``, float64 [Q], NaN without both
            classes; empty without the task ``like``.
        like_fits: Per mode the mean log-likelihood of each user's labels, beside ``aucs``.
        choice_fits: Per mode the mean log-likelihood of each user's targets, beside ``users``;
            empty where neither losses nor likes are measured.
        num_personalised: The number of users whose private adapter is not zero.
        private_steps: The number of private gradient steps of this evaluation, over all clients.
    """

    ranks: Mapping[Mode, Ranks]
    users: np.ndarray
    aucs: Mapping[Mode, np.ndarray]
    like_fits: Mapping[Mode, np.ndarray]
    choice_fits: Mapping[Mode, np.ndarray]
    num_personalised: int
    private_steps: int

    @property
    def num_users(self) -> int:
        """The number of evaluated users."""
        return len(self.users)

    def losses(self, mode: Mode) -> dict[str, float]:
        """The loss of each task on the held-out items in one mode, in nats, a mean over users.

        It is ``next_item_loss``, ln(candidates) for a guess, and with the task ``like`` also
        ``like_loss``, ln 2 for a guess; only what was measured.
        """
        fits = {"next_item_loss": self.choice_fits, "like_loss": self.like_fits}
        return {name: -float(own[mode].mean()) for name, own in fits.items() if mode in own}


@dataclass(frozen=True)
class EvaluationTask:
    """The queries of an evaluation, and the states and adapters that rank them.

    Attributes:
        held_out: All queries.
        negatives: From `candidates.sample_negatives` for ``held_out``.
        shared: The shared state to evaluate.
        parts: Per mode which adapters take part; None for zero-shot.
        keep: Store the personalised adapters with their clients, for serving.
        liked: Per query whether each target was liked; None: likes are not measured.
        window_items: How many of a query's newest items the language model reads; None: as many as
            a window holds.
        depth: Length of the ranked lists to keep; 0: none.
        losses: Whether ``choice_fits`` are measured where likes are not.
    """

    held_out: HeldOut
    negatives: np.ndarray
    shared: SharedState
    parts: Mapping[Mode, Parts | None]
    keep: bool = False
    liked: tuple[np.ndarray, ...] | None = None
    window_items: int | None = None
    depth: int = 0
    losses: bool = False

    @property
    def uses_private(self) -> bool:
        """Whether a private adapter takes part in any mode."""
        return any(parts is not None and parts.private_weight for parts in self.parts.values())

    def take(self, queries: Sequence[int]) -> "EvaluationTask":
        """The task with some of its queries, by their positions in ``held_out``."""
        return replace(
            self,
            held_out=self.held_out.take(queries),
            negatives=self.negatives[self.held_out.target_rows(queries)],
            liked=None if self.liked is None else tuple(self.liked[q] for q in queries),
        )

    @functools.cached_property
    def query_of(self) -> Mapping[int, int]:
        """User to index of the query in ``held_out``."""
        return {int(user): index for index, user in enumerate(self.held_out.users)}


@dataclass(frozen=True)
class ChunkScores:
    """Scores of the queries of one chunk of clients.

    Attributes:
        order: The queries' indices in the held-out split, by client.
        queries_per_client: How many of them each client of the chunk has.
        scores: Per mode float32 [Q, I].
        private: Stacked private tensors [C, ...] that took part; empty without any.
        stacked: These beside the shared ones.
    """

    order: tuple[int, ...]
    queries_per_client: tuple[int, ...]
    scores: Mapping[Mode, np.ndarray]
    private: Mapping[str, torch.Tensor]
    stacked: Mapping[str, torch.Tensor]


class Evaluator:
    """Ranks the held-out items of clients with our model in its modes.

    Args:
        scorer: Scores the catalogue.
        trainer: For personalisation.
        histories: The clients and their training windows.
        store: The clients' private folders.
    """

    def __init__(
        self,
        scorer: Scorer,
        trainer: LocalTrainer,
        histories: ClientHistories,
        store: PrivateStore,
    ) -> None:
        self._scorer = scorer
        self._model = scorer.model
        self._trainer = trainer
        self._histories = histories
        self._store = store

    def chunks(self, task: EvaluationTask, tokens_per_chunk: int) -> list[tuple[str, ...]]:
        """The clients to evaluate, grouped; equal on every process.

        Args:
            task: The queries.
            tokens_per_chunk: Bound on the padded tokens of a group. Where the catalogue is large, a
                group is smaller, so that its scores of one mode stay below 256 MB. A single client
                may exceed both; `rank_chunk` takes the users of a large silo in turn.
        """
        at_once = scoring.queries_at_once(self._model.num_items, tokens_per_chunk)
        clients = {self._histories.client_of(int(user)) for user in task.held_out.users}

        def num_tokens(client_id: str) -> int:
            shown = self._shown(client_id, task)
            lengths = [len(self._scorer.window(history).tokens) for history in shown]
            room = len(lengths) * max(max(lengths), tokens_per_chunk // at_once)
            return max(self._trainer.personalise_tokens(client_id), room)

        return plan_chunks(clients, num_tokens, tokens_per_chunk)

    def rank_chunk(
        self,
        chunk: Sequence[str],
        task: EvaluationTask,
        private: Mapping[str, torch.Tensor] | None = None,
        known: UserVectors | None = None,
    ) -> Measured:
        """Rank the targets of some clients' users; queries of other clients are ignored.

        Args:
            chunk: Client ids.
            task: The queries, and the states that rank them.
            private: Stacked private tensors [C, ...] to serve them with; None: each client's own,
                personalised now.
            known: User vectors that earlier calls on this split and shared state have read out;
                see `Scorer.score`.
        """
        pieces = self._pieces(chunk, task)
        if len(pieces) == 1:
            return self._rank(chunk, task, private, known)
        steps = 0
        if private is None:
            private = self._own_private(chunk, task)
            steps = self._trainer.personalise_steps(chunk) if private else 0
        found = combine([self._rank(chunk, piece, private, None) for piece in pieces])
        return replace(found, private_steps=steps)

    def _pieces(self, chunk: Sequence[str], task: EvaluationTask) -> list[EvaluationTask]:
        """The task in parts whose scores fit into memory: more than one for a large silo."""
        most = scoring.queries_at_once(self._model.num_items, _MOST_QUERIES)
        queries = [q for client_id in chunk for q in self._query_indices(client_id, task)]
        if len(chunk) > 1 or len(queries) <= most:
            return [task]
        return [task.take(queries[at : at + most]) for at in range(0, len(queries), most)]

    def _rank(
        self,
        chunk: Sequence[str],
        task: EvaluationTask,
        private: Mapping[str, torch.Tensor] | None,
        known: UserVectors | None,
    ) -> Measured:
        scored = self.score_chunk(chunk, task, private, known)
        asked = task.held_out.take(scored.order)
        ranks, aucs, likes, choices = {}, {}, {}, {}
        for mode, parts in task.parts.items():
            scores = scored.scores[mode]
            ranks[mode] = rank_scores(
                scores, task.held_out, scored.order, task.negatives, task.depth
            )
            if parts is None:
                continue
            if task.losses or task.liked is not None:
                choices[mode] = metrics.per_user_choice_log_likelihood(
                    scores, asked.histories, asked.targets
                )
            if task.liked is not None:
                aucs[mode], likes[mode] = self._likes(task, scored, parts)
        personalised = private is None and bool(scored.private)
        return Measured(
            ranks=ranks,
            users=asked.users,
            aucs=aucs,
            like_fits=likes,
            choice_fits=choices,
            num_personalised=self._count_active(scored),
            private_steps=self._trainer.personalise_steps(chunk) if personalised else 0,
        )

    def score_chunk(
        self,
        chunk: Sequence[str],
        task: EvaluationTask,
        private: Mapping[str, torch.Tensor] | None = None,
        known: UserVectors | None = None,
    ) -> ChunkScores:
        """Score the catalogue for the queries of some clients; see `rank_chunk`."""
        if private is None:
            private = self._own_private(chunk, task)
        stacked = self._scorer.stack(task.shared, private, len(chunk))
        shown = {client_id: self._shown(client_id, task) for client_id in chunk}
        return ChunkScores(
            order=tuple(q for client_id in chunk for q in self._query_indices(client_id, task)),
            queries_per_client=tuple(map(len, shown.values())),
            scores=self._scorer.score(shown, stacked, task.parts, known=known),
            private=private,
            stacked=stacked,
        )

    def _own_private(self, chunk: Sequence[str], task: EvaluationTask) -> dict[str, torch.Tensor]:
        """Private tensors [C, ...], fitted now and kept if asked; none where none takes part."""
        if not task.uses_private:
            return {}
        private = self._personalised(chunk, task)
        if task.keep:
            self._keep(chunk, private, task.shared.round_number)
        return private

    def _personalised(self, chunk: Sequence[str], task: EvaluationTask) -> dict[str, torch.Tensor]:
        """Private tensors [C, ...], fitted now.

        A part that takes gradient steps is trained on the training history, like everything that
        is trained. Any other part is fitted to the history that the query shows, like the scores
        of every method.
        """
        if self._model.objective.private.takes_steps:
            return self._trainer.personalise(chunk, task.shared)
        queries = [self._query_indices(client_id, task) for client_id in chunk]
        shown = [task.held_out.query(own[-1]).history if own else None for own in queries]
        return self._trainer.fit(chunk, task.shared, shown)

    def _likes(
        self, task: EvaluationTask, scored: ChunkScores, parts: Parts
    ) -> tuple[np.ndarray, np.ndarray]:
        """AUC and log-likelihood of each query, in the order in which they were scored."""
        assert task.liked is not None
        logits = self._model.like_logits(scored.stacked, parts).cpu().numpy()
        counts = scored.queries_per_client
        rows = np.repeat(np.arange(len(counts)), counts)
        targets = task.held_out.targets
        scores = [logits[c][targets[q]] for c, q in zip(rows, scored.order, strict=True)]
        liked = [task.liked[q] for q in scored.order]
        return metrics.per_user_auc(scores, liked), metrics.per_user_log_likelihood(scores, liked)

    def _shown(self, client_id: str, task: EvaluationTask) -> list[History]:
        """The part of each of a client's queries that the language model may read."""
        newest = slice(-task.window_items if task.window_items else None, None)
        indices = self._query_indices(client_id, task)
        return [task.held_out.query(q).history[newest] for q in indices]

    def _query_indices(self, client_id: str, task: EvaluationTask) -> list[int]:
        users = self._histories.clients[client_id].users
        return [task.query_of[user] for user in users if user in task.query_of]

    def _count_active(self, scored: ChunkScores) -> int:
        """The number of users whose private tensors change scores."""
        if not scored.private:
            return 0
        active = self._model.objective.private.active(scored.private)
        return int(active.cpu().numpy() @ scored.queries_per_client)

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


def combine(parts: Sequence[Measured]) -> Measured:
    """Join the figures of all chunks, users ascending."""
    users = np.concatenate([np.zeros(0, np.int64), *(part.users for part in parts)])
    by_user, modes = np.argsort(users), parts[0].ranks if parts else ()

    def joined(name: str) -> dict[Mode, np.ndarray]:
        found = [getattr(part, name) for part in parts]
        modes = found[0] if found else ()
        return {mode: np.concatenate([one[mode] for one in found])[by_user] for mode in modes}

    return Measured(
        ranks={mode: concatenate([part.ranks[mode] for part in parts]) for mode in modes},
        users=users[by_user],
        aucs=joined("aucs"),
        like_fits=joined("like_fits"),
        choice_fits=joined("choice_fits"),
        num_personalised=sum(part.num_personalised for part in parts),
        private_steps=sum(part.private_steps for part in parts),
    )


def sample_users(held_out: HeldOut, max_users: int | None, seed: int) -> HeldOut:
    """A fixed random sample of the queries; all of them when ``max_users`` is None."""
    count = len(held_out.users)
    if max_users is None or max_users >= count:
        return held_out
    generator = numpy_generator(seed, f"evaluated users/{held_out.name}")
    kept = np.sort(generator.choice(count, max_users, replace=False))
    return held_out.take(kept)
