"""What an audit says: a table, and a sentence for each mode."""

from collections.abc import Mapping, Sequence
from typing import Any

from pfm_llm.audit.figures import ADAPTER, MEMBERSHIP, PRECISION, RECALL, UPDATE
from pfm_llm.audit.modes import AuditMode

MARGIN = 0.05
"""How far above chance a figure counts as a leak, if its interval is above chance as well."""
_COLUMNS = ("mode", "surface", "figure", "value", "95 % interval", "chance")


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of an audit as lines of text, and what they come to.

    Args:
        rows: `AuditRow` as plain values.
    """
    lines = ["{:<7}{:<14}{:<17}{:>7}  {:<17}{:>7}".format(*_COLUMNS)]
    for row in rows:
        interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        lines.append(
            f"{row['mode']:<7}{row['surface']:<14}{row['metric']:<17}{row['value']:7.3f}  "
            f"{interval:<17}{row['chance']:7.3f}"
        )
    modes = [mode for mode in AuditMode if any(row["mode"] == mode for row in rows)]
    return "\n".join([*lines, "", *(sentence(mode, rows) for mode in modes)])


def sentence(mode: AuditMode, rows: Sequence[Mapping[str, Any]]) -> str:
    """What leaks in a mode, by `MARGIN`."""
    own = {(row["surface"], row["metric"]): row for row in rows if row["mode"] == mode}
    leaks: list[str] = []
    keeps: list[str] = []
    for surface in dict.fromkeys(surface for surface, _ in own):
        items = [own[key] for name in (PRECISION, RECALL) if (key := (surface, name)) in own]
        if items:
            (leaks if all(map(_is_leak, items)) else keeps).append(f"items from {_named(surface)}")
        if (surface, MEMBERSHIP) in own:
            what = "who trained" if surface == ADAPTER else "who is in"
            found = leaks if _is_leak(own[surface, MEMBERSHIP]) else keeps
            found.append(f"{what} {_named(surface)}")
    said = [
        f"{name} {', '.join(what)}" for name, what in (("leaks", leaks), ("keeps", keeps)) if what
    ]
    return f"{mode}: {'; '.join(said)}"


def _is_leak(row: Mapping[str, Any]) -> bool:
    return bool(row["value"] > row["chance"] + MARGIN and row["ci_low"] > row["chance"])


def _named(surface: str) -> str:
    if surface == UPDATE:
        return "one message"
    if surface == ADAPTER:
        return "the adapter"
    kind, _, count = surface.partition("_")
    return f"the sum of {count}" if kind == "sum" else f"what is released of {count}"
