"""The paired differences between a run and others, over the same users, with intervals."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.config.choices import Task
from pfm_llm.config.cut_offs import HEADLINE_K, headline_k
from pfm_llm.config.data import RECOGNISED, DataConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.evaluation.personality.estimates import (
    Bootstrap,
    Estimate,
    paired_difference,
    user_quality,
)
from pfm_llm.evaluation.personality.gain import auc_gain, rank_gain
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import FULL, ResultRow, judged_mode, read_results
from pfm_llm.protocol.types import Mode

_NDCG = "ndcg"

OVER = f"{_NDCG}_over_"
"""The prefix of the name of a difference to a reference."""

_AGAIN = "; run the script of benchmarks/baselines again"


@dataclass(frozen=True)
class Reference:
    """A method that a run is compared with.

    Attributes:
        name: The method.
        users: Internal ids, ascending, int64 [U].
        ndcg: NDCG of each at the run's headline cut-off, a user's targets averaged, over the full
            catalogue, float64 [U].
    """

    name: str
    users: np.ndarray
    ndcg: np.ndarray


def ranked_references(ranks: Mapping[str, Ranks], k: int = HEADLINE_K) -> list[Reference]:
    """References from the ranks of each method, with NDCG at ``k``."""
    return [
        Reference(name, np.unique(own.users), user_quality(_NDCG, own.full, own.users, k))
        for name, own in ranks.items()
    ]


def read_references(paths: Sequence[Path], config: ExperimentConfig, split: str) -> list[Reference]:
    """References from result files of ``benchmarks/baselines``, which have a figure per user.

    Args:
        paths: The files.
        config: The run's; both must have been measured on the same data.
        split: ``validation`` or ``test``.

    Raises:
        DataError: There is no such file, it has no figures per user on this split, it belongs to
            other data or other users, or two files belong to one method.
        CorruptFileError: It is not a result file.
    """
    references = [_read_reference(path, config, split) for path in paths]
    names = [reference.name for reference in references]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two files are of {name}; compare with one at a time")
    return references


def _read_reference(path: Path, config: ExperimentConfig, split: str) -> Reference:
    rows, extra = read_results(path)
    per_user = extra.get("per_user", {}).get(split)
    if not rows or not isinstance(per_user, dict) or "users" not in per_user:
        raise DataError(
            f"{path} has no figures of single users on {split}; give a file that a script of "
            "benchmarks/baselines wrote"
        )
    if _population(extra.get("config", {})) != _population(config.model_dump(mode="json")):
        raise DataError(
            f"{path} was measured on other data, users or another split than this run; measure the "
            "baseline again with the config of this run"
        )
    name = f"{_NDCG}@{headline_k(config.evaluation.ks)}"
    if name not in per_user:
        raise DataError(
            f"{path} has no {name} of single users on {split}; measure the baseline again with the "
            "config of this run"
        )
    try:
        users = np.asarray(per_user["users"], np.int64)
        ndcg = np.asarray(per_user[name], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: cannot read per_user of {split} ({error}){_AGAIN}"
        ) from error
    if users.shape != ndcg.shape or users.ndim != 1:
        raise CorruptFileError(f"{path}: users and {name} of {split} differ in length{_AGAIN}")
    return Reference(rows[0].method, users, ndcg)


def _population(config: Mapping[str, Any]) -> tuple[object, object]:
    """The settings that decide which users have a query, and for which items."""
    data = {**config.get("data", {})}
    with contextlib.suppress(ValidationError):  # settings that an earlier version did not have
        data = DataConfig.model_validate(data).model_dump(mode="json")
    data.pop("users_per_client", None)
    columns = data.get("columns") or {}
    if columns.get("rating") == RECOGNISED:  # it is null in earlier results
        data["columns"] = {**columns, "rating": None}
    # The seed draws the sample of users, where there is one.
    return data, config.get("seed") if data.get("max_users") else None


def bootstrap_of(config: ExperimentConfig) -> Bootstrap:
    """The settings of a run's intervals."""
    evaluated = config.evaluation
    return Bootstrap(evaluated.bootstrap, evaluated.confidence, config.seed)


def rows_over(
    config: ExperimentConfig,
    split: str,
    ranks: Mapping[Mode, Ranks],
    references: Sequence[Reference],
    of_shared: bool = False,
) -> list[ResultRow]:
    """Rows ``ndcg_over_<name>``: NDCG of a run at its headline cut-off minus each reference's.

    Args:
        config: The run's config.
        split: ``validation`` or ``test``.
        ranks: The run's ranks per mode; the mode that the run is judged by is compared.
        references: References of the same users.
        of_shared: Compare the shared part alone as well, in rows ``ndcg_over_<name>_shared``,
            where the run is judged with a private part.

    Raises:
        DataError: A reference is of other users.
    """
    judged = _mode_of(config)
    modes = {judged: ""}
    if of_shared:
        modes.setdefault(Mode.SHARED_ONLY, "_shared")
    k, figures = headline_k(config.evaluation.ks), {}
    for mode, suffix in modes.items():
        [own] = ranked_references({mode.value: ranks[mode]}, k)
        for reference in references:
            if not np.array_equal(reference.users, own.users):
                raise DataError(
                    f"{reference.name} was measured on other users than this run; measure both on "
                    "the same split and sample of users"
                )
            figures[f"{OVER}{reference.name}{suffix}"] = paired_difference(
                own.ndcg, reference.ndcg, bootstrap_of(config)
            )
    return estimate_rows(config, split, Task.NEXT_ITEM, figures)


def gains(
    ranks: Mapping[Mode, Ranks],
    aucs: Mapping[Mode, np.ndarray],
    bootstrap: Bootstrap,
    over: Mode = Mode.SHARED_ONLY,
    k: int = HEADLINE_K,
) -> dict[Task, dict[str, Estimate]]:
    """The gain of shared and private part together over one of them, in every measured task.

    Args:
        ranks: Ranks per mode.
        aucs: Per mode each user's AUC of likes, float64 [U]; empty without the task ``like``.
        bootstrap: The settings of the intervals.
        over: The mode to compare with.
        k: Cut-off of the NDCG.

    Returns:
        Per task the figures of `personality.rank_gain` and `personality.auc_gain`.
    """
    name = "" if over is Mode.SHARED_ONLY else "private"
    own, reference = ranks[Mode.SHARED_PRIVATE], ranks[over]
    found = {Task.NEXT_ITEM: rank_gain(own.full, reference.full, own.users, bootstrap, name, k)}
    if aucs:
        found[Task.LIKE] = auc_gain(aucs[Mode.SHARED_PRIVATE], aucs[over], bootstrap, name)
    return found


def gain_rows(
    config: ExperimentConfig,
    split: str,
    ranks: Mapping[Mode, Ranks],
    aucs: Mapping[Mode, np.ndarray],
) -> list[ResultRow]:
    """Rows ``gain_<quality>``: the gain from the private part; no rows without a private part.

    Args:
        config: The run's config.
        split: ``validation`` or ``test``.
        ranks: See `gains`.
        aucs: See `gains`.
    """
    if not config.adapters.private.enabled:
        return []
    k = headline_k(config.evaluation.ks)
    found = gains(ranks, aucs, bootstrap_of(config), k=k)
    return [
        row
        for task, figures in found.items()
        for row in estimate_rows(config, split, task, figures)
    ]


def estimate_rows(
    config: ExperimentConfig,
    split: str,
    task: Task,
    figures: Mapping[str, Estimate],
    budget: str = "",
) -> list[ResultRow]:
    """A row for each finite estimate, in the mode that the run is judged by.

    Args:
        config: The run's config.
        split: ``validation`` or ``test``.
        task: The task of the figures.
        figures: Metric to estimate.
        budget: Label of the budget, as in the rows.
    """
    describe = functools.partial(
        ResultRow,
        method=config.method.value,
        mode=_mode_of(config).value,
        task=task.value,
        protocol=config.data.split.value,
        budget=budget,
        split=split,
        candidates=FULL,
        seed=config.seed,
        regime=config.regime or "",
    )
    k = headline_k(config.evaluation.ks)
    return [
        describe(metric=name, k=k if _NDCG in name else 0, **asdict(figure))
        for name, figure in figures.items()
        if np.isfinite(figure.value)
    ]


def _mode_of(config: ExperimentConfig) -> Mode:
    return judged_mode(config.adapters.private.enabled)
