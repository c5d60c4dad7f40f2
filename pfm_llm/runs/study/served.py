"""Measuring a run with given private parts: stored ones, strangers' or older ones."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.evaluation import evaluator, scoring
from pfm_llm.evaluation.evaluator import EvaluationTask, Measured
from pfm_llm.evaluation.scorer import UserVectors
from pfm_llm.protocol.types import Mode, SharedState, Tensors
from pfm_llm.runs.measuring import only, quality_of
from pfm_llm.runs.run import Run

STRANGERS = 9
TOP_K = 20


class Served:
    """Serves the users of a task with given private parts.

    Args:
        run: The run; its store has the private part of each evaluated client.
        task: The queries, the modes and the states.
    """

    def __init__(self, run: Run, task: EvaluationTask) -> None:
        self._run, self._task = run, task
        self._known: UserVectors = {}  # of the task's queries and its shared state

    @functools.cached_property
    def by_strangers(self) -> dict[str, np.ndarray]:
        """Qualities of each user, [U, 1 + STRANGERS], with the own private part first.

        Returns:
            ``log_rank``. With the task ``like`` also ``auc``, ``log_likelihood``, and ``joint``:
            the log-likelihood of an event, that is, of the item and of the like together.
        """
        task, names = self._task, self._evaluated
        generator = numpy_generator(self._run.config.seed, "strangers")
        # With rotations of one random order, every private part serves equally often.
        order = [names[i] for i in generator.permutation(len(names))]
        place = {name: index for index, name in enumerate(order)}
        count = min(STRANGERS, len(order) - 1)
        shifts = 1 + generator.choice(len(order) - 1, count, replace=False)
        both = only(task, Mode.SHARED_PRIVATE)
        served = []
        chunks = self._chunks(both)
        show = Progress(1 + len(shifts), "serving strangers' adapters", True, unit="passes")
        with show as progress:
            for shift in (0, *shifts.tolist()):
                lender = {name: order[(place[name] + shift) % len(order)] for name in names}
                found = self._measure(both, lender, self._known, chunks)
                served.append(_qualities(found))
                progress.update(1)
        return {name: np.stack([one[name] for one in served], 1) for name in served[0]}

    def by_owners(self, task: EvaluationTask, description: str) -> Measured:
        """Measure, with each client's own stored private part.

        Args:
            task: The queries, the modes and the states.
            description: Text of the progress bar.
        """
        return self._measure(task, self._owners, {}, _shown(self._chunks(task), description))

    def changed(
        self, task: EvaluationTask, change: Callable[[Tensors], Tensors], description: str
    ) -> Measured:
        """Measure, with each client's own stored private part after a change.

        Args:
            task: The queries and the shared state of this object's task, in some modes.
                Prompts may show another number of items.
            change: Maps stacked private tensors [C, ...] to what is served.
            description: Text of the progress bar.
        """
        chunks = _shown(self._chunks(task), description)
        known = self._known if task.window_items == self._task.window_items else {}
        return self._measure(task, self._owners, known, chunks, change)

    def mean_part(self) -> dict[str, torch.Tensor]:
        """The mean over the evaluated clients of their stored private tensors, if there are any."""
        if not self._task.uses_private:
            return {}
        return {name: value.mean(0) for name, value in self._kept(self._evaluated).items()}

    @property
    def _evaluated(self) -> list[str]:
        """The clients that have a query, sorted."""
        client_of = self._run.clients.histories.client_of
        return sorted({client_of(int(user)) for user in self._task.held_out.users})

    @property
    def _owners(self) -> Mapping[str, str]:
        """Every client as its own lender."""
        return {name: name for name in self._run.clients.histories.clients}

    def _measure(
        self,
        task: EvaluationTask,
        lender: Mapping[str, str],
        known: UserVectors,
        chunks: Iterable[tuple[str, ...]],
        change: Callable[[Tensors], Tensors] = dict,
    ) -> Measured:
        """Measure each client with the changed part of its lender; ``known``: see `measure`."""
        rank, parts = self._run.evaluator.rank_chunk, []
        for chunk in chunks:
            # Without a private mode, no private state is stored.
            kept = self._kept([lender[c] for c in chunk]) if task.uses_private else {}
            parts.append(rank(chunk, task, change(kept), known))
        return evaluator.combine(parts)

    def _chunks(self, task: EvaluationTask) -> Sequence[tuple[str, ...]]:
        return self._run.evaluator.chunks(task, self._run.config.runtime.tokens_per_chunk)

    def _kept(self, client_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        states = []
        for client_id in client_ids:
            state = self._run.clients.store.load_personalised(client_id)
            assert state is not None, "every evaluated client keeps a private adapter"
            states.append(state.tensors)
        return {name: torch.stack([s[name] for s in states]) for name in states[0]}

    def top(
        self,
        shared: SharedState,
        private: Sequence[Mapping[str, torch.Tensor]] | None,
        description: str,
    ) -> tuple[list[Mapping[str, torch.Tensor]], np.ndarray]:
        """The best items of each query under some shared state.

        Args:
            shared: The shared state.
            private: Private tensors chunk by chunk; None: fitted to ``shared``.
            description: Text of the progress bar.

        Returns:
            The private tensors, chunk by chunk, and the items, int64 [Q, k], best first.
        """
        task = only(self._task, Mode.SHARED_PRIVATE, shared=shared, liked=None)
        num_items = len(self._run.data.interactions.catalogue)
        # All lists have one length, which the user with the longest history limits.
        length = min(TOP_K, num_items - max(len(set(h.tolist())) for h in task.held_out.histories))
        used, top = [], np.zeros((len(task.held_out.users), length), np.int64)
        for index, chunk in enumerate(_shown(self._chunks(task), description)):
            scored = self._run.evaluator.score_chunk(
                chunk, task, private[index] if private else None
            )
            used.append(scored.private)
            rows = zip(scored.order, scored.scores[Mode.SHARED_PRIVATE], strict=True)
            for query, scores in rows:
                seen = task.held_out.histories[query]
                top[query] = scoring.top_items(scores, seen, length)[0]
        return used, top


def _shown(chunks: Sequence[tuple[str, ...]], description: str) -> Iterator[tuple[str, ...]]:
    """The chunks, one after another, under a progress bar that counts their clients."""
    with Progress(sum(map(len, chunks)), description) as progress:
        for chunk in chunks:
            yield chunk
            progress.update(len(chunk))


def _qualities(found: Measured) -> dict[str, np.ndarray]:
    """The qualities by which strangers' private parts are compared."""
    mode = Mode.SHARED_PRIVATE
    qualities = {"log_rank": quality_of(found, mode)}
    if found.aucs:
        likes = found.like_fits[mode]
        qualities |= {
            "auc": found.aucs[mode],
            "log_likelihood": likes,
            "joint": found.choice_fits[mode] + likes,
        }
    return qualities
