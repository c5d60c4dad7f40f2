"""What a finished run says about personality: every measure of `personality`, on test.

Private adapters are those that evaluation fits and keeps. Settings and groups come from train and
validation; nothing is fitted to test.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pfm_llm.config.choices import Task
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import comparison, personality
from pfm_llm.evaluation import evaluator
from pfm_llm.evaluation.evaluator import EvaluationTask
from pfm_llm.evaluation.personality import Bootstrap, Estimate, GroupHarm
from pfm_llm.evaluation.results import ResultRow, read_results, write_results
from pfm_llm.runs.experiment import SERVER_FOLDER, OpenedRun, open_run, shared_state
from pfm_llm.runs.folders import RESULTS_FILE, RunFolders
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.report import (
    evaluation_task,
    fit_run_baselines,
    fit_run_likes,
    measure,
    rank_baselines,
    rows_of,
)
from pfm_llm.server.checkpoint import CheckpointStore
from pfm_llm.runs.study.cold_start import known_by_few, known_by_none
from pfm_llm.runs.study.served import Served, quality_of

WINDOWS = (32, 16, 8, 4)
GIVEN = (0, 1, 2, 5, 10)
_MODES = (Mode.SHARED_ONLY, Mode.PRIVATE_ONLY, Mode.SHARED_PRIVATE)
_SERVED = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)


def study_run(run: Path, budget: str) -> list[ResultRow]:
    """Measure a finished run on test: ranks, likes, and personality where something is private.

    Three things are added to the run's ``results.json``: per-user gains under ``per_user``, under
    ``harm`` the p-values of each group of users (see `personality.group_harm`), and under
    ``private_weight`` how strongly the private part counted.

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
        extra |= {
            "per_user": study.per_user(),
            "harm": study.harm_tests(),
            "private_weight": study.private_weight,
        }
        write_results(path, kept, extra)
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
        self._served = Served(self._assembly, self._task)

    def test_rows(self) -> list[ResultRow]:
        """Every mode and baseline on test."""
        baselines = rank_baselines(fit_run_baselines(self._assembly), self._task)
        likes = fit_run_likes(self._assembly)
        rows = rows_of(self._assembly, self._task, self._test, baselines, likes)
        references = comparison.ranked_references(baselines)
        name = self._task.held_out.name
        return rows + comparison.rows_over(self._config, name, self._test.ranks, references)

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
            self._new_items(),
        )
        rows = self._rows(next_item, Task.NEXT_ITEM, budget)
        if self._test.aucs:
            rows += self._rows(self._like_figures(), Task.LIKE, budget)
        return rows

    def _rows(self, figures: Mapping[str, Estimate], task: Task, budget: str) -> list[ResultRow]:
        name, mode = self._task.held_out.name, comparison.best_mode(self._test.ranks)
        return comparison.estimate_rows(self._config, name, mode, task, figures, budget)

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

    def _gain(self, name: str) -> np.ndarray:
        own, shared = (quality_of(self._test, mode, name) for mode in reversed(_SERVED))
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
        served = self._by_strangers
        gains = personality.named_estimates(
            personality.auc_gain(own, aucs[Mode.SHARED_ONLY], self._bootstrap),
            personality.auc_gain(own, aucs[Mode.PRIVATE_ONLY], self._bootstrap, "private"),
        )
        if not _has_strangers(served["auc"]):
            return gains
        return gains | personality.named_estimates(
            personality.swap_loss("auc", served["auc"], self._bootstrap),
            personality.swap_loss("log_likelihood", served["log_likelihood"], self._bootstrap),
            # Ten likes give an AUC of few values: most users would tie.
            personality.identification(served["log_likelihood"], self._bootstrap),
            personality.identification(served["joint"], self._bootstrap, "joint"),
        )

    def harm_tests(self) -> dict[str, dict[str, float | bool]]:
        """Per group of users whether it is harmed, before and after Holm's correction."""
        return {
            name: {
                "p_value": group.p_value,
                "adjusted_p_value": group.adjusted_p_value,
                "is_harmed": group.is_harmed,
                "is_harmed_adjusted": group.is_harmed_adjusted,
            }
            for name, group in self._groups.items()
        }

    def _harm(self) -> dict[str, Estimate]:
        found = personality.harm_figures(self._groups)
        return {**found, **personality.not_harmed(self._gain("log_rank"), self._bootstrap)}

    @functools.cached_property
    def _groups(self) -> dict[str, GroupHarm]:
        """Groups by quality on validation, by activity, and by what is known of the users."""
        split = self._assembly.corpus.split
        held_out, users = split.validation, self._task.held_out.users
        task = dataclasses.replace(
            self._task_of(held_out), parts=evaluator.parts_of([Mode.SHARED_ONLY], 0.0), liked=None
        )
        validated = measure(self._assembly, self._opened.processes, task)
        quality = quality_of(validated, Mode.SHARED_ONLY)
        quality = personality.align(quality, held_out.users, users)
        train = split.train.interactions
        fields = {
            name: [values[user] for user in users] for name, values in train.user_fields.items()
        }
        groupings = personality.user_groupings(quality, np.diff(train.offsets)[users], fields)
        return personality.group_harm(self._gain("log_rank"), groupings, self._bootstrap)

    def _swap(self) -> dict[str, Estimate]:
        served = self._by_strangers["log_rank"]
        if not _has_strangers(served):
            return {}
        return personality.named_estimates(
            personality.swap_loss("log_rank", served, self._bootstrap),
            personality.identification(served, self._bootstrap),
        )

    @functools.cached_property
    def _by_strangers(self) -> dict[str, np.ndarray]:
        return self._served.by_strangers()

    @property
    def private_weight(self) -> float:
        """How strongly the private part counts: as set, or as validation chose."""
        return self._config.adapters.private.weight

    def _memory(self) -> dict[str, Estimate]:
        """Quality as queries show fewer of the newest items; the private adapter stays."""
        own: dict[int, np.ndarray] = {}
        shared: dict[int, np.ndarray] = {}
        for items in (w for w in WINDOWS if w <= self._config.window.items):
            task = dataclasses.replace(
                self._task,
                window_items=items,
                parts=evaluator.parts_of(_SERVED, self.private_weight),
                keep=False,
                liked=None,
            )
            is_default = items == self._config.window.items
            shown = f"prompts of {items} items"
            found = self._test if is_default else self._served.by_owners(task, shown)
            own[items] = quality_of(found, Mode.SHARED_PRIVATE)
            shared[items] = quality_of(found, Mode.SHARED_ONLY)
        return personality.curve_figures(personality.MEMORY, own, shared, self._bootstrap)

    def _cold_start(self) -> dict[str, Estimate]:
        """Quality for users of whom only the first so many interactions are known."""
        folder = RunFolders.of(self._run).private
        own: dict[int, np.ndarray] = {}
        shared: dict[int, np.ndarray] = {}
        for given in GIVEN:
            if given:
                own[given], shared[given] = known_by_few(
                    self._assembly, self._task, given, folder, self._opened.processes
                )
            else:
                own[0] = shared[0] = known_by_none(self._assembly, self._task)
        return personality.curve_figures(personality.COLD_START, own, shared, self._bootstrap)

    def _new_items(self) -> dict[str, Estimate]:
        """Quality on items that nobody met in training."""
        held_out, train = self._task.held_out, self._assembly.corpus.split.train.interactions
        num_items = self._assembly.parts.model.num_items
        was_met = np.zeros(num_items, dtype=bool)
        was_met[train.items] = True
        own, shared = (self._test.ranks[mode] for mode in reversed(_SERVED))
        candidates = [num_items - len(np.unique(history)) for history in held_out.histories]
        return personality.new_item_figures(
            own.full,
            shared.full,
            own.users,
            np.repeat(candidates, [len(targets) for targets in held_out.targets]),
            ~was_met[np.concatenate(held_out.targets)],
            self._bootstrap,
        )

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
        newest = self._opened.shared, self._opened.round_number
        old_private, before_top = self._served.top(
            before, before_round, None, f"lists of round {before_round}"
        )
        _, untuned_top = self._served.top(*newest, old_private, "lists after the merge")
        _, retuned_top = self._served.top(*newest, None, "the same, tuned anew")
        return personality.named_estimates(
            personality.integrity(before_top, untuned_top, self._bootstrap),
            personality.integrity(before_top, retuned_top, self._bootstrap, retuned=True),
        )


def _has_strangers(served: np.ndarray) -> bool:
    """Not where a single user has a query."""
    return served.shape[1] > 1
