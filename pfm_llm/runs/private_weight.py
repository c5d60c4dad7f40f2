"""How strongly the private part counts: chosen on validation when a run ends.

A private part that pays in one domain can harm in another, where an item occurs once and its
embedding remembers whose. With ``evaluator.private_weights`` a run asks validation, pooled over
the users: of the weights given, the one by which mean log-rank is best. With 0 among them the
fall-back is the shared part alone. What is measured on test plays no part in it.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError
from pfm_llm.base.processes import Processes
from pfm_llm.evaluation import evaluator, personality
from pfm_llm.evaluation.evaluator import UserVectors
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.runs.report import measure, validation_task
from pfm_llm.runs.run import Assembly

WEIGHT_FILE = "private_weight.json"
"""In a run's public folder: the weight, its round, and the mean log-rank gain of each."""

_log = logging.getLogger(__name__)


def with_chosen_weight(
    assembly: Assembly, processes: Processes, run: Path, shared: SharedState
) -> Assembly:
    """A run's objects, with the weight that validation chooses, or has chosen before.

    A choice stands as long as the round and the weights to choose from are the same.

    Args:
        assembly: The run's objects. They are returned as they are without
            ``evaluator.private_weights``, and where nobody has a validation query.
        processes: Who works on it.
        run: The run's public folder, where the choice is kept.
        shared: The shared state at hand.

    Raises:
        CorruptFileError: The kept choice cannot be read.
    """
    config = assembly.config
    private = config.adapters.private
    asked = config.evaluation.private_weights and private.enabled
    if not asked or not len(assembly.corpus.split.validation.users):
        return assembly
    with processes.together():
        weight = _kept(run / WEIGHT_FILE, shared.round_number, config.evaluation.private_weights)
    if weight is None:
        gains = _gains(assembly, processes, shared)
        weight = max(gains, key=lambda w: (gains[w], -w))
        if processes.is_main:
            found = {"round": shared.round_number, "weight": weight, "gain_log_rank": gains}
            files.write_json(run / WEIGHT_FILE, found)
            _log.info("private part counts %g, chosen on validation", weight)
        processes.wait()
    adapters = config.adapters.model_copy(
        update={"private": private.model_copy(update={"weight": weight})}
    )
    return dataclasses.replace(assembly, config=config.model_copy(update={"adapters": adapters}))


def _kept(path: Path, round_number: int, weights: Collection[float]) -> float | None:
    if not path.exists():
        return None
    try:
        found = files.read_json(path)
        asked = {float(weight) for weight in found["gain_log_rank"]}
        stands = found["round"] == round_number and asked == set(weights)
        return float(found["weight"]) if stands else None
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); delete it") from error


def _gains(assembly: Assembly, processes: Processes, shared: SharedState) -> dict[float, float]:
    """Mean gain in log-rank over no private part, on validation, by weight; ascending."""
    task = validation_task(assembly, shared, ())
    known: dict[tuple[str, ...], UserVectors] = defaultdict(dict)

    def quality(weight: float) -> float:
        parts = evaluator.parts_of([Mode.SHARED_PRIVATE], weight)
        asked = dataclasses.replace(task, parts=parts, liked=None)
        ranks = measure(assembly, processes, asked, known).ranks[Mode.SHARED_PRIVATE]
        return float(personality.user_quality("log_rank", ranks.full, ranks.users).mean())

    without = quality(0.0)
    return {
        weight: quality(weight) - without if weight else 0.0
        for weight in sorted(assembly.config.evaluation.private_weights)
    }
