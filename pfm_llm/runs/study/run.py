"""The study of a finished run: every measure of `personality`, on test.

The private parts are those that the evaluation fits and stores. Settings and groups come from train
and validation; nothing is fitted to test.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.config.choices import Task
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.evaluation import comparison
from pfm_llm.evaluation.evaluator import Measured
from pfm_llm.evaluation.openings import OPENINGS
from pfm_llm.evaluation.personality.curves import (
    COLD_START,
    MEMORY,
    curve_figures,
    over_longer,
    over_none,
)
from pfm_llm.evaluation.personality.estimates import Estimate, align, named_estimates
from pfm_llm.evaluation.personality.groups import user_groupings
from pfm_llm.evaluation.personality.harm import GroupHarm, group_harm, harm_figures, not_harmed
from pfm_llm.evaluation.personality.integrity import integrity
from pfm_llm.evaluation.personality.swap import identification, swap_loss
from pfm_llm.evaluation.results import ResultRow, read_results, write_results
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.folders import RESULTS_FILE
from pfm_llm.runs.measuring import (
    count_test,
    evaluation_task,
    fit_run_baselines,
    fit_run_likes,
    gain_of,
    measure,
    only,
    quality_of,
    rank_baselines,
    rows_of,
)
from pfm_llm.runs.opening import run_in_work
from pfm_llm.runs.run import Run, Trained
from pfm_llm.runs.study.cold_start import known_by_few, known_by_none
from pfm_llm.runs.study.new_items import new_items
from pfm_llm.runs.study.pieces import controls, pieces_alone, serve_pieces, steps_over_read
from pfm_llm.runs.study.qualities import write_qualities
from pfm_llm.runs.study.served import Served
from pfm_llm.runs.summary import PRIVATE_WEIGHT

WINDOWS = (32, 16, 8, 4)
GIVEN = (0, 1, 2, 5, 10)
MANY = 20
"""Held-out events that tell more surely whose a private part is."""
_MODES = (Mode.SHARED_ONLY, Mode.PRIVATE_ONLY, Mode.SHARED_PRIVATE)
_SERVED = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)


def study_run(folder: Path, budget: str, openings: Path | None = None) -> list[ResultRow]:
    """Measure a finished run on test: ranks, likes, and the personality of a private part.

    The run's ``results.json`` gets ``test_openings`` (see `count_opening`), and with a private part
    three more entries: ``per_user`` with the gain of each user, ``harm`` with the p-values of each
    group of users (see `harm.group_harm`), and ``private_weight`` with the weight of that part.

    Args:
        folder: The run's folder.
        budget: Label of the budget in the rows.
        openings: The file that counts measurements of test; None: the one beside the run's folder.

    Raises:
        CheckpointError: The run has no committed round.
        BusyError: Another process trains or measures the run.
    """
    with run_in_work(folder) as (run, trained):
        found: dict[str, Any] = {OPENINGS: count_test(run, openings)}
        study = _Study(run, trained, budget)
        rows = study.test_rows()
        study.keep_qualities(folder)
        if run.config.adapters.private.enabled:
            rows += study.personality_rows()
            found |= {
                "per_user": study.per_user(),
                "harm": study.harm_tests(),
                PRIVATE_WEIGHT: trained.private_weight,
            }
        path = folder / RESULTS_FILE
        kept, extra = read_results(path)
        write_results(path, kept, {**extra, **found})
        return rows


class _Study:
    """Measures of one run; see `study_run`."""

    def __init__(self, run: Run, trained: Trained, budget: str) -> None:
        self._run, self._trained, self._budget = run, trained, budget
        self._bootstrap = comparison.bootstrap_of(run.config)
        self._k = headline_k(run.config.evaluation.ks)
        self._task = evaluation_task(run, trained, run.data.split.test, _MODES, keep=True)
        self._test = measure(run, self._task)
        self._served = Served(run, self._task)

    def test_rows(self) -> list[ResultRow]:
        """Every mode and baseline on test."""
        baselines = rank_baselines(fit_run_baselines(self._run), self._task)
        references = comparison.ranked_references(baselines, self._k)
        name = self._task.held_out.name
        rows = [
            *rows_of(self._run, self._task, self._test, baselines, fit_run_likes(self._run)),
            *comparison.rows_over(
                self._run.config, name, self._test.ranks, references, of_shared=True
            ),
        ]
        return [dataclasses.replace(row, budget=self._budget) for row in rows]

    def keep_qualities(self, folder: Path) -> None:
        """Keep how well each user is served; see `qualities`."""
        write_qualities(folder, self._test, self._k)

    def per_user(self) -> dict[str, list[float]]:
        """The gain of each user over the shared part alone, sorted, so that no user is named.

        Users without an AUC have no gain in AUC.
        """
        gains = {
            f"gain_{name}": gain_of(self._test, name, self._k) for name in ("log_rank", "ndcg")
        }
        if self._test.aucs:
            own, shared = (self._test.aucs[mode] for mode in reversed(_SERVED))
            gains["gain_auc"] = own - shared
        return {name: np.sort(values[~np.isnan(values)]).tolist() for name, values in gains.items()}

    def personality_rows(self) -> list[ResultRow]:
        """Every measure as rows; positive is better for the user."""
        over_shared, over_private = (
            comparison.gains(self._test.ranks, self._test.aucs, self._bootstrap, over, self._k)
            for over in (Mode.SHARED_ONLY, Mode.PRIVATE_ONLY)
        )
        next_item = named_estimates(
            over_shared[Task.NEXT_ITEM],
            over_private[Task.NEXT_ITEM],
            harm_figures(self._groups),
            not_harmed(gain_of(self._test), self._bootstrap),
            self._strangers(("log_rank",), {"log_rank": ""}),
            self._controls(),
            self._integrity(),
            self._memory(),
            self._cold_start(),
            new_items(self._run, self._task, self._test, self._bootstrap),
        )
        rows = self._rows(next_item, Task.NEXT_ITEM)
        if self._test.aucs:
            like = named_estimates(
                over_shared[Task.LIKE],
                over_private[Task.LIKE],
                # With ten likes the AUC has few possible values, and most users would tie.
                self._strangers(
                    ("auc", "log_likelihood"), {"log_likelihood": "", "joint": "joint"}
                ),
            )
            rows += self._rows(like, Task.LIKE)
        return rows

    def _rows(self, figures: Mapping[str, Estimate], task: Task) -> list[ResultRow]:
        split = self._task.held_out.name
        return comparison.estimate_rows(self._run.config, split, task, figures, self._budget)

    def harm_tests(self) -> dict[str, dict[str, float | bool]]:
        """For each group of users, whether it is harmed, before and after Holm's correction."""
        return {
            name: {key: value for key, value in vars(group).items() if key != "gain"}
            for name, group in self._groups.items()
        }

    @functools.cached_property
    def _groups(self) -> dict[str, GroupHarm]:
        """Groups by quality on validation, by activity, and by the fields of the users."""
        split = self._run.data.split
        held_out, users = split.validation, self._task.held_out.users
        task = evaluation_task(self._run, self._trained, held_out, [Mode.SHARED_ONLY])
        validated = measure(self._run, only(task, Mode.SHARED_ONLY, liked=None))
        quality = quality_of(validated, Mode.SHARED_ONLY)
        quality = align(quality, held_out.users, users)
        train = split.train.interactions
        fields = {
            name: [values[user] for user in users] for name, values in train.user_fields.items()
        }
        groupings = user_groupings(quality, np.diff(train.offsets)[users], fields)
        return group_harm(gain_of(self._test), groupings, self._bootstrap)

    def _strangers(self, lost: Sequence[str], told_by: Mapping[str, str]) -> dict[str, Estimate]:
        """The loss with strangers' private parts, and how often one's own is identified.

        Args:
            lost: Qualities for the loss.
            told_by: Qualities for the identification, each with its name in the figure.

        Returns:
            Empty if only one user has a query: then there are no strangers.
        """
        served = self._served.by_strangers
        if any(qualities.shape[1] == 1 for qualities in served.values()):
            return {}
        return named_estimates(
            *(swap_loss(name, served[name], self._bootstrap) for name in lost),
            *(self._identified(served[name], called) for name, called in told_by.items()),
        )

    def _identified(self, served: np.ndarray, called: str) -> dict[str, Estimate]:
        """Identification of all users, and of those with `MANY` held-out events.

        Args:
            served: float64 [U, 1 + S]; see `identification`.
            called: The quality's name in the figures.
        """
        found = identification(served, self._bootstrap, called)
        events = np.array([len(targets) for targets in self._task.held_out.targets])
        many = served[(events >= MANY) & ~np.isnan(served).any(axis=1)]
        if not len(many):
            return found
        return found | identification(many, self._bootstrap, f"{called}_{MANY}".lstrip("_"))

    def _controls(self) -> dict[str, Estimate]:
        """What is personal in a private part, where the tensors of users can be averaged."""
        private = self._run.model.private
        if private.takes_steps:
            return {}
        task, test, settings = self._task, self._test, (self._bootstrap, self._k)
        return named_estimates(
            controls(self._served, task, test, private.pieces, *settings),
            steps_over_read(self._run, task, test, *settings),
        )

    def _memory(self) -> dict[str, Estimate]:
        """Quality when the queries show fewer of the newest items, with the same private part."""
        found: dict[int, Measured] = {}
        longest = self._run.config.window.items
        for items in (w for w in WINDOWS if w <= longest):
            found[items] = self._test
            if items != longest:
                task = only(self._task, *_SERVED, window_items=items, liked=None)
                found[items] = self._served.by_owners(task, f"prompts of {items} items")
        if not found:
            return {}

        def curve(mode: Mode, name: str) -> dict[int, np.ndarray]:
            return {items: quality_of(one, mode, name, self._k) for items, one in found.items()}

        own, shared = (curve(mode, "log_rank") for mode in reversed(_SERVED))
        own_ndcg, shared_ndcg = (curve(mode, "ndcg") for mode in reversed(_SERVED))
        return named_estimates(
            curve_figures(MEMORY, own, shared, self._bootstrap),
            curve_figures(f"{MEMORY}_ndcg", own_ndcg, shared_ndcg, self._bootstrap),
            over_longer(own, shared, self._bootstrap),
            self._pieces_alone(min(found), found[min(found)]),
        )

    def _pieces_alone(self, items: int, found: Measured) -> dict[str, Estimate]:
        """What each piece of the private part adds where prompts show so many items."""
        task = only(self._task, *_SERVED, window_items=items, liked=None)
        pieces = serve_pieces(self._served, task, self._run.model.private.pieces)
        alone = pieces_alone(pieces, found, self._bootstrap, self._k)
        return {f"{name}_{items}": value for name, value in alone.items()}

    def _cold_start(self) -> dict[str, Estimate]:
        """Quality for users with only a few known interactions."""
        own: dict[int, np.ndarray] = {}
        shared: dict[int, np.ndarray] = {}
        for given in GIVEN:
            if given:
                own[given], shared[given] = known_by_few(self._run, self._task, given)
            else:
                own[0] = shared[0] = known_by_none(self._run, self._task)
        curve = curve_figures(COLD_START, own, shared, self._bootstrap)
        return named_estimates(curve, over_none(own, shared, self._bootstrap))

    def _integrity(self) -> dict[str, Estimate]:
        """The similarity of the rankings under the newest shared state and the one before."""
        rounds = self._run.checkpoints.rounds()
        if len(rounds) < 2:
            return {}
        before, newest = self._run.committed(rounds[-2]), self._trained.shared
        old_private, before_top = self._served.top(before, None, f"lists of round {rounds[-2]}")
        _, untuned_top = self._served.top(newest, old_private, "lists after the merge")
        _, retuned_top = self._served.top(newest, None, "the same, tuned anew")
        return named_estimates(
            integrity(before_top, untuned_top, self._bootstrap),
            integrity(before_top, retuned_top, self._bootstrap, retuned=True),
        )
