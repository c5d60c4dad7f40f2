"""The status of a suite's runs (done, stale, failed, begun or missing), from files, without torch.

A result is valid as long as the settings that training depends on (`config.training_hash`), the
grid, the script and the criterion of choice are unchanged. Settings that follow from the data size
are derived from the number of clients in the result. A setting that is newer than a result
counts as its default there, except settings of a private kind, which define how it is fitted.
A result that holds differences to another run is valid as long as the figures of that run are those
that it was compared with. Results from before these were noted are taken to be so.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.earlier import from_earlier
from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.config.schema import ExperimentConfig, parse_config, training_hash
from pfm_llm.config.settings import changed_settings
from pfm_llm.config.settle import settle, settle_like
from pfm_llm.suite.plan import Plan, Point, SuiteRun

COMPARED = "compared"
"""The key of a result: for ``against`` and ``beside`` the other run's label and `figures_hash`."""
_OF_SCRIPTS = ("data.", "seed ", "tasks ")
"""The settings that the model of a script depends on, as `changed_settings` writes them."""
_BASELINES = "none"
"""Their mode; `types.Mode` needs torch."""


class State(StrEnum):
    """The status of a run with one seed."""

    DONE = "done"
    STALE = "stale"
    FAILED = "failed"
    BEGUN = "begun"
    MISSING = "missing"


@dataclass(frozen=True)
class Status:
    """A state with a detail.

    Attributes:
        state: The state.
        detail: The chosen value and figure, the reason, or the number of experiments.
    """

    state: State
    detail: str


def status_of(plan: Plan, run: SuiteRun, results: Path) -> Status:
    """The status of a run.

    Args:
        plan: The plan of the run.
        run: A run of the plan.
        results: The folder of all results.
    """
    stored = read_tree(plan.result(run, results))
    if stored is not None:
        reasons = _differences(stored, plan, run) or _recompared(stored, plan, run, results)
        if reasons:
            return Status(State.STALE, "; ".join(reasons))
        if "failed" in stored:
            return Status(State.FAILED, str(stored["failed"]))
        return Status(State.DONE, _summary(stored, plan))
    done = sum(is_recorded(point) for point in run.points)
    if done or any(point.folder.exists() for point in run.points):
        return Status(State.BEGUN, f"{done} of {len(run.points)} trained")
    return Status(State.MISSING, f"{len(run.points)} to train" if run.script is None else "")


def list_text(plan: Plan, results: Path) -> str:
    """One line for each run and seed (label, state, detail), and a line with the totals."""
    found = [(run.label, status_of(plan, run, results)) for run in plan.runs]
    width = max(len(label) for label, _ in found)
    lines = [f"{label:{width}}  {s.state:7}  {s.detail}".rstrip() for label, s in found]
    counts = {state: sum(s.state is state for _, s in found) for state in State}
    total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*lines, f"{plan.suite}, budget {plan.budget}: {total}"])


def is_recorded(point: Point) -> bool:
    """Whether there is a record of an experiment with these settings."""
    stored = read_tree(point.record)
    return stored is not None and not changes(stored, point.config)


def changes(stored: Mapping[str, Any], config: ExperimentConfig) -> list[str]:
    """The differing settings among those that training depends on.

    Args:
        stored: The ``config`` of an earlier run as written and, if known, its ``training_hash``
            and its number of training clients, ``num_clients``.
        config: The config to run now.

    Returns:
        One text for each setting.
    """
    if stored.get("training_hash") == training_hash(config):
        return []
    try:
        old = parse_config(from_earlier(stored["config"]))
    except (ConfigError, KeyError, TypeError, ValueError):
        return ["its config has settings that this version does not know"]
    num_clients = _num_clients(stored)  # None: a script's, which trains a model of its own
    settled = settle_like(config, old) if num_clients is None else settle(config, num_clients)
    found = changed_settings(old, settled) + _gained(stored, config)
    # A script's model has none of our model's settings.
    return [text for text in found if text.startswith(_OF_SCRIPTS) or not stored.get("script")]


def _num_clients(stored: Mapping[str, Any]) -> int | None:
    """Number of training clients of an earlier run; None if unknown."""
    if stored.get("num_clients") is not None:
        return int(stored["num_clients"])
    # Older results lack the number; their clients are single users.
    data = stored.get("environment", {}).get("data", {})
    return data.get("num_users")


def _gained(stored: Mapping[str, Any], config: ExperimentConfig) -> list[str]:
    """Settings of the private kind that an earlier run lacks; without them, the kind differed."""
    private = config.adapters.private
    if not private.enabled:
        return []
    before = stored["config"].get("adapters", {}).get("private", {})
    now = private.model_dump()
    return [
        f"adapters.private.{group}.{name} did not exist"
        for group in (private.kind, *PRIVATE_KINDS[private.kind].reads)
        for name, value in now.get(group, {}).items()
        if name not in before.get(group, {}) and value is not None  # None: as without the setting
    ]


def read_tree(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _differences(stored: Mapping[str, Any], plan: Plan, run: SuiteRun) -> list[str]:
    """The reasons why a result does not belong to the plan; empty if it does."""
    grid = stored.get("grid")
    if not isinstance(grid, dict) or not isinstance(grid.get("values"), list):
        return ["its file lacks the grid"]
    now = {
        "select": plan.select.model_dump(),
        "script": None if run.script is None else list(run.script),
        "grid key": run.key,
        "grid values": [point.value for point in run.points],
    }
    before = {
        "select": stored.get("select"),
        "script": stored.get("script"),
        "grid key": grid.get("key"),
        "grid values": [entry.get("value") for entry in grid["values"]],
    }
    found = [
        f"{what} was {before[what]}, is {now[what]}" for what in now if before[what] != now[what]
    ]
    if found:
        return found
    # The other points differ from this one by the grid's value alone.
    chosen = next((p for p in run.points if p.value == grid.get("chosen")), run.points[0])
    return changes(stored, chosen.config)


def figures_hash(stored: Mapping[str, Any]) -> str:
    """An identity of a result's own figures on test, 16 hex digits: another training has another.

    It depends on the settings of the training, and on NDCG in each mode.
    """
    rows = sorted(
        (row["mode"], row["k"], row["value"])
        for row in stored.get("rows", ())
        if (row["split"], row["metric"], row["mode"] == _BASELINES) == ("test", "ndcg", False)
    )
    content = json.dumps([stored.get("training_hash"), rows])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _recompared(stored: Mapping[str, Any], plan: Plan, run: SuiteRun, results: Path) -> list[str]:
    """The comparisons of a result that no longer hold; empty where it does not say with what."""
    found = []
    for key, name in (("against", run.against), ("beside", run.beside)):
        before = stored.get(COMPARED, {}).get(key)
        if before is None or name is None:
            continue
        label = f"{name}-s{run.seed}"
        other = read_tree(plan.result(run, results).with_name(f"{label}.json"))
        if before["run"] != label:
            found.append(f"{key} was {before['run']}, is {label}")
        elif other and not other.get("failed") and figures_hash(other) != before["figures"]:
            found.append(
                f"{label}, with which it is compared, was measured anew since; run the suite to "
                "compare them anew"
            )
    return found


def _summary(stored: Mapping[str, Any], plan: Plan) -> str:
    grid = stored["grid"]
    parts = []
    if grid["key"] is not None:
        parts.append(f"{grid['key']} {grid['chosen']}")
    figure = next((e["figure"] for e in grid["values"] if e["value"] == grid["chosen"]), None)
    if figure is not None:
        parts.append(f"{plan.select.figure} {figure:.4f} on validation")
    if stored.get("did_not_learn"):
        parts.append("did not learn")
    return ", ".join(parts)
