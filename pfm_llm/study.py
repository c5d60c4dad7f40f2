"""What a finished run says about personality: every measure of `personality`, on test.

Private adapters are those that evaluation fits and keeps, on training histories. Settings and
groups come from train and validation; nothing is fitted to test.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfm_llm import evaluation, personality, ranking, scoring
from pfm_llm.assembly import RunFolders, make_trainer
from pfm_llm.baselines import fit_baselines
from pfm_llm.checkpoint import CheckpointStore
from pfm_llm.choices import Task
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import HeldOut, TrainData
from pfm_llm.evaluation import EvaluationTask, Evaluator, Measured
from pfm_llm.experiment import SERVER_FOLDER, OpenedRun, open_run, shared_state
from pfm_llm.head import ITEM_BIAS
from pfm_llm.histories import ClientHistories
from pfm_llm.personality import Bootstrap, Estimate
from pfm_llm.private_store import PrivateStore
from pfm_llm.progress import Progress
from pfm_llm.reporting import evaluation_task, measure, method_name, rows_of
from pfm_llm.run_report import RESULTS_FILE, ResultRow, read_results, write_results
from pfm_llm.seeding import numpy_generator
from pfm_llm.types import Mode, SharedState

STRANGERS = 9
WINDOWS = (32, 16, 8, 4)
GIVEN = (0, 1, 2, 5, 10)
_TOP_K = 20
_MODES = (Mode.SHARED_ONLY, Mode.PRIVATE_ONLY, Mode.SHARED_PRIVATE)
_SERVED = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)


def study_run(run: Path, budget: str) -> list[ResultRow]:
    """Measure a finished run on test: ranks, likes, and personality where something is private.

    Per-user gains are added to the run's ``results.json`` under ``per_user``.

    Args:
        run: The run's folder.
        budget: Its label in the rows.

    Raises:
        CheckpointError: Nothing was ever committed.
    """
    opened = open_run(run)
    study = _Study(opened, run)
    rows = [dataclasses.replace(row, budget=budget) for row in study.test_rows()]
    if opened.assembly.config.adapters.private.enabled:
        rows += study.personality_rows(budget)
        path = run / RESULTS_FILE
        kept, extra = read_results(path)
        write_results(path, kept, {**extra, "per_user": study.per_user()})
    return rows


class _Study:
    """Measures of one run; see `study_run`."""

    def __init__(self, opened: OpenedRun, run: Path) -> None:
        self._opened, self._run = opened, run
        self._assembly = opened.assembly
        config = self._assembly.config
        self._config = config
        evaluated = config.evaluation
        self._bootstrap = Bootstrap(evaluated.bootstrap, evaluated.confidence, config.seed)
        self._task = self._task_of(self._assembly.corpus.split.test, keep=True)
        self._test = measure(self._assembly, opened.processes, self._task)

    def test_rows(self) -> list[ResultRow]:
        """Every mode and baseline on test."""
        split = self._assembly.corpus.split
        train = split.train.interactions
        baselines = fit_baselines(
            self._config.evaluation.baselines,
            [train.history(user) for user in range(train.num_users)],
            self._assembly.parts.model.num_items,
            split.validation,
        )
        return rows_of(self._assembly, self._task, self._test, baselines)

    def per_user(self) -> dict[str, list[float]]:
        """Gains over shared only, one a user, in ascending order: nobody's can be told.

        Users without an AUC have none of that kind.
        """
        gains = {"gain_log_rank": self._gain("log_rank"), "gain_ndcg": self._gain("ndcg")}
        if self._test.aucs:
            own, shared = (self._test.aucs[mode] for mode in reversed(_SERVED))
            gains["gain_auc"] = own - shared
        return {name: np.sort(values[~np.isnan(values)]).tolist() for name, values in gains.items()}

    def personality_rows(self, budget: str) -> list[ResultRow]:
        """Every measure as rows, positive is better for the user."""
        next_item = personality.named_estimates(
            self._gains(),
            self._harm(),
            self._swap(),
            self._integrity(),
            self._memory(),
            self._cold_start(),
        )
        rows = self._rows(next_item, Task.NEXT_ITEM, budget)
        if self._test.aucs:
            rows += self._rows(self._like_figures(), Task.LIKE, budget)
        return rows

    def _rows(self, figures: Mapping[str, Estimate], task: Task, budget: str) -> list[ResultRow]:
        config = self._config
        describe = functools.partial(
            ResultRow,
            method=method_name(config),
            mode=Mode.SHARED_PRIVATE.value,
            task=task.value,
            protocol=config.data.split.value,
            budget=budget,
            split=self._task.held_out.name,
            candidates=ranking.FULL,
            seed=config.seed,
            regime=config.regime or "",
        )
        return [
            describe(metric=name, k=10 if "ndcg" in name else 0, **dataclasses.asdict(figure))
            for name, figure in figures.items()
            if np.isfinite(figure.value)
        ]

    def _task_of(self, held_out: HeldOut, keep: bool = False) -> EvaluationTask:
        opened = self._opened
        modes = [
            mode
            for mode in _MODES
            if self._config.adapters.private.enabled or mode is Mode.SHARED_ONLY
        ]
        return evaluation_task(
            self._assembly, held_out, opened.shared, opened.round_number, modes, keep
        )

    def _quality(self, measured: Measured, mode: Mode, name: str) -> np.ndarray:
        ranks = measured.ranks[mode]
        return personality.user_quality(name, ranks.full, ranks.users)

    def _gain(self, name: str) -> np.ndarray:
        own, shared = (self._quality(self._test, mode, name) for mode in reversed(_SERVED))
        difference: np.ndarray = own - shared
        return difference

    def _gains(self) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        own = self._test.ranks[Mode.SHARED_PRIVATE]
        for mode, over in ((Mode.SHARED_ONLY, ""), (Mode.PRIVATE_ONLY, "private")):
            reference = self._test.ranks[mode].full
            found |= personality.rank_gain(own.full, reference, own.users, self._bootstrap, over)
        return found

    def _like_figures(self) -> dict[str, Estimate]:
        aucs = self._test.aucs
        own = aucs[Mode.SHARED_PRIVATE]
        served = self._served_by_strangers()[1]
        return personality.named_estimates(
            personality.auc_gain(own, aucs[Mode.SHARED_ONLY], self._bootstrap),
            personality.auc_gain(own, aucs[Mode.PRIVATE_ONLY], self._bootstrap, "private"),
            personality.swap_loss("auc", served, self._bootstrap),
            personality.identification(served, self._bootstrap),
        )

    def _harm(self) -> dict[str, Estimate]:
        """Groups by quality on validation, by activity, and by what is known of the users."""
        split = self._assembly.corpus.split
        held_out, users = split.validation, self._task.held_out.users
        task = dataclasses.replace(
            self._task_of(held_out), parts=evaluation.parts_of([Mode.SHARED_ONLY], 0.0), liked=None
        )
        validated = measure(self._assembly, self._opened.processes, task)
        quality = self._quality(validated, Mode.SHARED_ONLY, "log_rank")
        quality = personality.align(quality, held_out.users, users)
        train = split.train.interactions
        fields = {
            name: [values[user] for user in users] for name, values in train.user_fields.items()
        }
        groupings = personality.user_groupings(quality, np.diff(train.offsets)[users], fields)
        gain = self._gain("log_rank")
        found = personality.harm_figures(personality.group_harm(gain, groupings, self._bootstrap))
        return {**found, **personality.not_harmed(gain, self._bootstrap)}

    def _swap(self) -> dict[str, Estimate]:
        served = self._served_by_strangers()[0]
        return personality.named_estimates(
            personality.swap_loss("log_rank", served, self._bootstrap),
            personality.identification(served, self._bootstrap),
        )

    @functools.cache  # noqa: B019 a study lives as long as its run
    def _served_by_strangers(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-rank quality and AUC of each user, [U, 1 + STRANGERS]: own adapter first."""
        assembly, task = self._assembly, self._task
        clients = assembly.histories.clients
        names = sorted({assembly.histories.client_of(int(u)) for u in task.held_out.users})
        generator = numpy_generator(self._config.seed, "strangers")
        # Rotations of one random order: everybody's adapter serves as often as everybody else's.
        order = [names[i] for i in generator.permutation(len(names))]
        place = {name: index for index, name in enumerate(order)}
        count = min(STRANGERS, len(order) - 1)
        shifts = 1 + generator.choice(len(order) - 1, count, replace=False)
        only = dataclasses.replace(
            task, parts=evaluation.parts_of([Mode.SHARED_PRIVATE], self._weight), keep=False
        )
        columns, aucs = [], []
        with Progress(1 + len(shifts), "serving with strangers' adapters", True) as progress:
            for shift in (0, *shifts.tolist()):
                lender = {name: order[(place[name] + shift) % len(order)] for name in clients}
                found = self._measure_with(only, lender)
                columns.append(self._quality(found, Mode.SHARED_PRIVATE, "log_rank"))
                aucs.append(found.aucs.get(Mode.SHARED_PRIVATE, np.zeros(0)))
                progress.update(1)
        return np.stack(columns, 1), np.stack(aucs, 1)

    @property
    def _weight(self) -> float:
        return self._config.adapters.private.weight

    def _measure_with(self, task: EvaluationTask, lender: Mapping[str, str]) -> Measured:
        """Measure, each client served with the kept private adapter of its lender."""
        evaluator = self._assembly.evaluator
        chunks = evaluator.chunks(task, self._config.runtime.tokens_per_chunk)
        return evaluation.combine(
            [
                evaluator.rank_chunk(chunk, task, self._kept([lender[c] for c in chunk]))
                for chunk in chunks
            ]
        )

    def _kept(self, client_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        states = []
        for client_id in client_ids:
            state = self._assembly.store.load_personalised(client_id)
            assert state is not None, "every evaluated client keeps a private adapter"
            states.append(state.tensors)
        return {name: torch.stack([s[name] for s in states]) for name in states[0]}

    def _memory(self) -> dict[str, Estimate]:
        """Quality as queries show fewer of the newest items; the private adapter stays."""
        own: dict[int, np.ndarray] = {}
        shared: dict[int, np.ndarray] = {}
        same = {name: name for name in self._assembly.histories.clients}
        for items in (w for w in WINDOWS if w <= self._config.window.items):
            task = dataclasses.replace(
                self._task,
                window_items=items,
                parts=evaluation.parts_of(_SERVED, self._weight),
                keep=False,
                liked=None,
            )
            found = self._measure_with(task, same)
            own[items] = self._quality(found, Mode.SHARED_PRIVATE, "log_rank")
            shared[items] = self._quality(found, Mode.SHARED_ONLY, "log_rank")
        points = personality.curve(own, shared, self._bootstrap)
        return personality.curve_figures(personality.MEMORY, points)

    def _cold_start(self) -> dict[str, Estimate]:
        """Quality for users of whom only the first so many interactions are known."""
        own: dict[int, np.ndarray] = {}
        shared: dict[int, np.ndarray] = {}
        for given in GIVEN:
            own[given], shared[given] = (
                self._known_by_few(given) if given else self._known_by_none()
            )
        points = personality.curve(own, shared, self._bootstrap)
        return personality.curve_figures(personality.COLD_START, points)

    def _known_by_none(self) -> tuple[np.ndarray, np.ndarray]:
        """Without a history there is no state: the item biases alone rank, for everybody."""
        held_out = self._task.held_out
        num_items = self._assembly.parts.model.num_items
        bias = self._opened.shared.tensors.get(ITEM_BIAS, torch.zeros(num_items)).numpy()
        empty = dataclasses.replace(
            held_out, histories=tuple(np.zeros(0, np.int32) for _ in held_out.users)
        )
        queries = range(len(held_out.users))
        scores = np.tile(bias, (len(queries), 1))
        ranks = ranking.rank_scores(scores, empty, queries, self._task.negatives)
        quality = personality.user_quality("log_rank", ranks.full, ranks.users)
        return quality, quality

    def _known_by_few(self, given: int) -> tuple[np.ndarray, np.ndarray]:
        assembly, config = self._assembly, self._config
        train = first_events(assembly.corpus.split.train.interactions, given)
        users = self._task.held_out.users.tolist()
        rated = [] if train.ratings is None else [train.ratings_of(user) for user in users]
        task = dataclasses.replace(
            self._task,
            held_out=dataclasses.replace(
                self._task.held_out,
                histories=tuple(train.history(user) for user in users),
                history_ratings=tuple(r for r in rated if r is not None) or None,
            ),
            parts=evaluation.parts_of(_SERVED, self._weight),
            keep=False,
            liked=None,
        )
        threshold = config.data.like_threshold if Task.LIKE in config.tasks else None
        clients = tuple(assembly.histories.clients.values())
        histories = ClientHistories(
            clients, TrainData(train), assembly.parts.encoder, assembly.cache, threshold
        )
        with tempfile.TemporaryDirectory(dir=RunFolders.of(self._run).private) as folder:
            # An empty store: what a client learned from its whole history must not be known.
            store = PrivateStore(Path(folder))
            trainer = make_trainer(config, assembly.parts, histories, store)
            evaluator = Evaluator(
                assembly.parts.model,
                trainer,
                histories,
                assembly.parts.encoder,
                assembly.cache,
                store,
            )
            found = measure(
                dataclasses.replace(assembly, evaluator=evaluator), self._opened.processes, task
            )
        own = self._quality(found, Mode.SHARED_PRIVATE, "log_rank")
        return own, self._quality(found, Mode.SHARED_ONLY, "log_rank")

    def _integrity(self) -> dict[str, Estimate]:
        """How far rankings move when the newest shared state replaces the one before."""
        store = CheckpointStore(RunFolders.of(self._run).public / SERVER_FOLDER)
        rounds = store.rounds()
        if len(rounds) < 2:
            return {}
        before_round = sorted(rounds)[-2]
        checkpoint = store.load(before_round)
        assert checkpoint is not None
        before = shared_state(self._assembly, checkpoint)
        old_private, before_top = self._top(before, before_round, None)
        _, untuned_top = self._top(self._opened.shared, self._opened.round_number, old_private)
        _, retuned_top = self._top(self._opened.shared, self._opened.round_number, None)
        return personality.named_estimates(
            personality.integrity(before_top, untuned_top, self._bootstrap),
            personality.integrity(before_top, retuned_top, self._bootstrap, retuned=True),
        )

    def _top(
        self, shared: SharedState, round_number: int, private: Sequence[Any] | None
    ) -> tuple[list[Any], np.ndarray]:
        """Private tensors chunk by chunk, and the best items of each query, [Q, k]."""
        task = dataclasses.replace(
            self._task,
            shared=shared,
            round_number=round_number,
            parts=evaluation.parts_of([Mode.SHARED_PRIVATE], self._weight),
            keep=False,
            liked=None,
        )
        evaluator = self._assembly.evaluator
        chunks = evaluator.chunks(task, self._config.runtime.tokens_per_chunk)
        num_items = self._assembly.parts.model.num_items
        # Lists of one length: whoever has seen the most leaves the fewest to rank.
        length = min(_TOP_K, num_items - max(len(set(h.tolist())) for h in task.held_out.histories))
        used, top = [], np.zeros((len(task.held_out.users), length), np.int64)
        for index, chunk in enumerate(chunks):
            scored = evaluator.score_chunk(chunk, task, private[index] if private else None)
            used.append(scored.private)
            rows = zip(scored.order, scored.scores[Mode.SHARED_PRIVATE], strict=True)
            for query, scores in rows:
                seen = task.held_out.histories[query]
                top[query] = scoring.top_items(scores, seen, length)[0]
        return used, top


def first_events(interactions: Interactions, count: int) -> Interactions:
    """Every user's first ``count`` events, in arrays of their own."""
    lengths = np.diff(interactions.offsets)
    place = np.arange(len(interactions.items)) - np.repeat(interactions.offsets[:-1], lengths)
    kept = place < count
    times, ratings = interactions.timestamps, interactions.ratings
    return dataclasses.replace(
        interactions,
        offsets=np.concatenate(([0], np.cumsum(np.minimum(lengths, count)))),
        items=interactions.items[kept],
        timestamps=None if times is None else times[kept],
        ratings=None if ratings is None else ratings[kept],
    )
