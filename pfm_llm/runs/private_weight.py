"""The weight of the private part, chosen on validation at the end of a run.

A private part that helps in one domain can harm in another, for example if most items occur once.
So a run chooses the weight with the best mean log-rank over the validation users, among those of
``evaluation.private_weights``. With 0 among them, as by default, the shared part alone is a
possible choice. The test split has no influence.
"""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError
from pfm_llm.evaluation.evaluator import parts_of
from pfm_llm.evaluation.scorer import UserVectors
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.runs.measuring import measure, quality_of, validation_task
from pfm_llm.runs.run import Run, Trained

WEIGHT_FILE = "private_weight.json"
"""File in a run's public folder: the chosen weight, its round, and the gain of each weight."""

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""What a run chooses from unless it is told."""

_log = logging.getLogger(__name__)


def choose_weight(run: Run, shared: SharedState) -> Trained:
    """A shared state with the private weight that is best on validation.

    An earlier choice stays valid for the same round and the same weights. Without weights to choose
    from, or without validation queries, the weight is that of the config.

    Args:
        run: The run. The choice is kept in its public folder.
        shared: The shared state.

    Raises:
        CorruptFileError: The kept choice cannot be read.
    """
    weights = _weights(run)
    if not weights or not len(run.data.split.validation.users):
        return run.as_set(shared)
    path = run.folders.public / WEIGHT_FILE
    with run.processes.together():
        weight = _kept(path, shared.round_number, weights)
    if weight is None:
        gains = _gains(run, shared, weights)
        weight = max(gains, key=lambda w: (gains[w], -w))
        if run.processes.is_main:
            found = {"round": shared.round_number, "weight": weight, "gain_log_rank": gains}
            files.write_json(path, found)
            _log.info("private part counts %g, chosen on validation", weight)
        run.processes.wait()
    return Trained(shared, weight)


def _weights(run: Run) -> Collection[float]:
    """What to choose from. A part that takes steps would be trained anew for each weight."""
    private, given = run.config.adapters.private, run.config.evaluation.private_weights
    if not private.enabled:
        return ()
    if given is not None:
        return given
    # What is chosen on users' events is not covered by a guarantee of privacy.
    is_private = run.config.federation.privacy is not None
    chooses = not (is_private or run.model.private.takes_steps or private.weight != 1)
    return WEIGHTS if chooses else ()


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


def _gains(run: Run, shared: SharedState, weights: Collection[float]) -> dict[float, float]:
    """Mean gain in log-rank over the shared part alone, on validation, by ascending weight."""
    mode = Mode.SHARED_PRIVATE
    task = validation_task(run, run.as_set(shared), [mode])
    known: UserVectors = {}

    def quality(weight: float) -> float:
        weighted = dataclasses.replace(task, parts=parts_of([mode], weight), liked=None)
        return float(quality_of(measure(run, weighted, known), mode).mean())

    without = quality(0.0)
    return {weight: quality(weight) - without if weight else 0.0 for weight in sorted(weights)}
