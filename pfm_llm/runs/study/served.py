"""Measuring a run with private adapters that are given: kept ones, strangers', older ones."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

import numpy as np
import torch

from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.evaluation import evaluator, personality, scoring
from pfm_llm.evaluation.evaluator import EvaluationTask, Measured, UserVectors
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.runs.run import Assembly

STRANGERS = 9
TOP_K = 20


class Served:
    """Serves the users of a task with private adapters of the caller's choice.

    Args:
        assembly: The run's objects; its store holds every evaluated client's adapter.
        task: What to rank.
    """

    def __init__(self, assembly: Assembly, task: EvaluationTask) -> None:
        self._assembly, self._task = assembly, task
        self._weight = assembly.config.adapters.private.weight

    def by_strangers(self) -> dict[str, np.ndarray]:
        """Qualities of each user, [U, 1 + STRANGERS]: own adapter first.

        Returns:
            ``log_rank``, and with the task ``like`` its ``auc`` and ``log_likelihood``, and
            ``joint``: the log-likelihood of an event, of what was met and whether it was liked.
        """
        assembly, task = self._assembly, self._task
        names = sorted({assembly.histories.client_of(int(u)) for u in task.held_out.users})
        generator = numpy_generator(assembly.config.seed, "strangers")
        # Rotations of one random order: everybody's adapter serves as often as everybody else's.
        order = [names[i] for i in generator.permutation(len(names))]
        place = {name: index for index, name in enumerate(order)}
        count = min(STRANGERS, len(order) - 1)
        shifts = 1 + generator.choice(len(order) - 1, count, replace=False)
        only = dataclasses.replace(
            task, parts=evaluator.parts_of([Mode.SHARED_PRIVATE], self._weight), keep=False
        )
        served = []
        known: dict[tuple[str, ...], UserVectors] = defaultdict(dict)
        chunks = self._chunks(only)
        show = Progress(1 + len(shifts), "serving strangers' adapters", True, unit="passes")
        with show as progress:
            for shift in (0, *shifts.tolist()):
                lender = {name: order[(place[name] + shift) % len(order)] for name in names}
                found = self._measure(only, lender, known, chunks)
                served.append(_qualities(found))
                progress.update(1)
        return {name: np.stack([one[name] for one in served], 1) for name in served[0]}

    def by_owners(self, task: EvaluationTask, description: str) -> Measured:
        """Measure, each client served with its own kept private adapter.

        Args:
            task: What to rank with what.
            description: What the progress bar says.
        """
        same = {name: name for name in self._assembly.histories.clients}
        chunks = _shown(self._chunks(task), description)
        return self._measure(task, same, defaultdict(dict), chunks)

    def _measure(
        self,
        task: EvaluationTask,
        lender: Mapping[str, str],
        known: MutableMapping[tuple[str, ...], UserVectors],
        chunks: Iterable[tuple[str, ...]],
    ) -> Measured:
        """Each client with the adapter of its lender; ``known`` is what was read out before."""
        rank = self._assembly.evaluator.rank_chunk
        return evaluator.combine(
            [
                rank(chunk, task, self._kept([lender[c] for c in chunk]), known[chunk])
                for chunk in chunks
            ]
        )

    def _chunks(self, task: EvaluationTask) -> Sequence[tuple[str, ...]]:
        tokens = self._assembly.config.runtime.tokens_per_chunk
        return self._assembly.evaluator.chunks(task, tokens)

    def _kept(self, client_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        if not self._weight:  # nothing private is served, so nothing was kept
            return {}
        states = []
        for client_id in client_ids:
            state = self._assembly.store.load_personalised(client_id)
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
            description: What the progress bar says.

        Returns:
            The private tensors, chunk by chunk, and int64 [Q, k], the best first.
        """
        task = dataclasses.replace(
            self._task,
            shared=shared,
            parts=evaluator.parts_of([Mode.SHARED_PRIVATE], self._weight),
            keep=False,
            liked=None,
        )
        num_items = self._assembly.parts.model.num_items
        # Lists of one length: whoever has seen the most leaves the fewest to rank.
        length = min(TOP_K, num_items - max(len(set(h.tolist())) for h in task.held_out.histories))
        used, top = [], np.zeros((len(task.held_out.users), length), np.int64)
        for index, chunk in enumerate(_shown(self._chunks(task), description)):
            scored = self._assembly.evaluator.score_chunk(
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


def quality_of(measured: Measured, mode: Mode, name: str = "log_rank") -> np.ndarray:
    """A quality of `personality.user_quality` per user, float64 [U]."""
    ranks = measured.ranks[mode]
    return personality.user_quality(name, ranks.full, ranks.users)


def _qualities(found: Measured) -> dict[str, np.ndarray]:
    """What strangers' adapters are compared by."""
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
