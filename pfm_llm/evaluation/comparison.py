"""A run beside others, paired over users: the difference whose interval judges a claim."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.config.choices import Task
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import method_name
from pfm_llm.evaluation import personality
from pfm_llm.evaluation.personality import Bootstrap, Estimate
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import FULL, HEADLINE_K, ResultRow, read_results
from pfm_llm.protocol.types import Mode

_NDCG = "ndcg"


@dataclass(frozen=True)
class Reference:
    """What a run is compared with.

    Attributes:
        name: The method.
        users: Internal ids, ascending, int64 [U].
        ndcg: NDCG@10 of each, a user's targets averaged, over the full catalogue, float64 [U].
    """

    name: str
    users: np.ndarray
    ndcg: np.ndarray


def ranked_references(ranks: Mapping[str, Ranks]) -> list[Reference]:
    """References from the ranks of each method."""
    return [_reference(name, own) for name, own in ranks.items()]


def _reference(name: str, ranks: Ranks) -> Reference:
    ndcg = personality.user_quality(_NDCG, ranks.full, ranks.users)
    return Reference(name, np.unique(ranks.users), ndcg)


def read_references(paths: Sequence[Path], config: ExperimentConfig, split: str) -> list[Reference]:
    """References from result files of ``benchmarks/baselines``, which keep what each user got.

    Args:
        paths: The files.
        config: The run's; both must have been measured on the same data.
        split: ``validation`` or ``test``.

    Raises:
        DataError: There is no such file, it says nothing of single users on this split, it is of
            other data or other users, or two files are of one method.
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
            f"{path} does not say what each user got on {split}; give a file that a script of "
            "benchmarks/baselines wrote"
        )
    if _population(extra.get("config", {})) != _population(config.model_dump(mode="json")):
        raise DataError(f"{path} was measured on other data, users or another split than this run")
    try:
        users = np.asarray(per_user["users"], np.int64)
        ndcg = np.asarray(per_user["ndcg@10"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: per_user of {split} cannot be read: {error}") from error
    if users.shape != ndcg.shape or users.ndim != 1:
        raise CorruptFileError(f"{path}: per_user of {split} has unequal lists")
    return Reference(rows[0].method, users, ndcg)


def _population(config: Mapping[str, Any]) -> tuple[object, object]:
    """What decides which users are asked for which items."""
    data = {**config.get("data", {})}
    data.pop("users_per_client", None)
    # The seed draws the sample of users, where there is one.
    return data, config.get("seed") if data.get("max_users") else None


def rows_over(
    config: ExperimentConfig,
    split: str,
    ranks: Mapping[Mode, Ranks],
    references: Sequence[Reference],
) -> list[ResultRow]:
    """Rows ``ndcg_over_<name>``: NDCG@10 of a run's best mode minus each reference's.

    Args:
        config: The run's.
        split: ``validation`` or ``test``.
        ranks: Of the run, per mode; the best is `best_mode`.
        references: Of the same users.

    Raises:
        DataError: A reference is of other users.
    """
    mode = best_mode(ranks)
    own = _reference(mode.value, ranks[mode])
    evaluated = config.evaluation
    bootstrap = Bootstrap(evaluated.bootstrap, evaluated.confidence, config.seed)
    figures = {}
    for reference in references:
        if not np.array_equal(reference.users, own.users):
            raise DataError(f"{reference.name} was measured on other users than this run")
        difference = personality.paired_difference(own.ndcg, reference.ndcg, bootstrap)
        figures[f"ndcg_over_{reference.name}"] = difference
    return estimate_rows(config, split, mode, Task.NEXT_ITEM, figures)


def best_mode(ranks: Mapping[Mode, Ranks]) -> Mode:
    """That with the private adapter, if there is one."""
    return Mode.SHARED_PRIVATE if Mode.SHARED_PRIVATE in ranks else Mode.SHARED_ONLY


def estimate_rows(
    config: ExperimentConfig,
    split: str,
    mode: Mode,
    task: Task,
    figures: Mapping[str, Estimate],
    budget: str = "",
) -> list[ResultRow]:
    """A row for each finite estimate.

    Args:
        config: The run's.
        split: ``validation`` or ``test``.
        mode: Which adapters took part.
        task: What was predicted.
        figures: Metric to estimate.
        budget: As in the rows.
    """
    describe = functools.partial(
        ResultRow,
        method=method_name(config),
        mode=mode.value,
        task=task.value,
        protocol=config.data.split.value,
        budget=budget,
        split=split,
        candidates=FULL,
        seed=config.seed,
        regime=config.regime or "",
    )
    return [
        describe(metric=name, k=HEADLINE_K if _NDCG in name else 0, **asdict(figure))
        for name, figure in figures.items()
        if np.isfinite(figure.value)
    ]
