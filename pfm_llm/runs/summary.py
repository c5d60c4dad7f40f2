"""The findings of a run in sentences: the gain of its private part, and comparisons."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pfm_llm.evaluation.comparison import OVER
from pfm_llm.evaluation.personality.estimates import Estimate
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.protocol.types import Mode

COMPARISONS, GAINS = "comparisons", "gains"
"""Keys of ``results.json``: rows of differences, see `comparison.rows_over` and `gain_rows`."""

PRIVATE_WEIGHT = "private_weight"
"""Key of ``results.json``: the weight of the private part; absent without a private part."""

_UNITS = {
    "gain_log_rank": "log-rank (a held-out item stands at {percent:.0f} % of its former rank)",
    "gain_ndcg": "NDCG@{k}",
    "gain_auc": "AUC in telling liked from disliked items",
}
_JUDGED = {
    Mode.SHARED_PRIVATE: "the shared part with the private one",
    Mode.SHARED_ONLY: "the shared part",
}


def of_run(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """The findings of a run, and the commands that show more of it, a line each.

    Args:
        folder: The run's folder.
        results: See `findings`.
    """
    shown, compare = "one user's list", ""
    if PRIVATE_WEIGHT in results:
        shown, compare = "what the private part changes for one user", " --compare"
    return [
        *findings(results),
        f"To see {shown}: pfm recommend --run {folder} --user ID{compare}",
        f"To measure this run again: pfm evaluate --run {folder}",
    ]


def findings(results: Mapping[str, Any]) -> list[str]:
    """The gain of the private part, and the comparison with each baseline, a line each.

    Args:
        results: The entries of ``results.json`` beside the rows, as `read_results` returns them.
    """
    gains, comparisons = (
        [ResultRow(**row) for row in results.get(key, ())] for key in (GAINS, COMPARISONS)
    )
    lines = []
    if gains and not results.get(PRIVATE_WEIGHT):
        lines.append("The private part adds nothing: it is left out, at a weight of 0.")
    elif gains:
        lines += [_gain(row) for row in gains]
    lines += [_comparison(row) for row in comparisons]
    if lines:
        level = results["config"]["evaluation"]["confidence"]
        lines.append(
            f"These are mean differences over the same users, with {level * 100:g} % intervals; a "
            "positive one is better for the user."
        )
    return lines + _refused(results.get("costs", {}))


def refused_by_reason(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many updates were refused for each reason, over the records of rounds."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.get("refused_by_reason", {}))
    return dict(total)


def _refused(costs: Mapping[str, Any]) -> list[str]:
    """A line about refused updates, if there were any."""
    if not costs.get("refused_updates"):
        return []
    reasons = costs.get("refused_by_reason", {})
    counts = ", ".join(f"{name} {count}" for name, count in sorted(reasons.items()))
    told = f" ({counts})" if counts else ""
    return [
        f"Of {costs['client_rounds']} updates of clients, {costs['refused_updates']} were refused"
        f"{told} and had no effect."
    ]


def differences_table(rows: Sequence[ResultRow], confidence: float) -> str:
    """Rows of differences as Markdown, one line a row; empty without rows.

    Args:
        rows: The differences.
        confidence: Coverage of the intervals in the rows, for their label.
    """
    if not rows:
        return ""
    ks = sorted({row.k for row in rows if row.k})
    of_ndcg = f"; NDCG is {', '.join(f'NDCG@{k}' for k in ks)}" if ks else ""
    lines = [
        f"Differences, paired over users; positive is better for this run{of_ndcg}",
        "",
        f"| Split | Difference | Value [{confidence * 100:g} %] | Users |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [f"| {row.split} | {row.metric} | {_value(row)} | {row.num_users} |" for row in rows]
    return "\n".join([*lines, ""])


def _gain(row: ResultRow) -> str:
    unit = _UNITS[row.metric].format(percent=100 * math.exp(-row.value), k=row.k)
    verdict = _verdict(
        row,
        better="users are served better with it",
        worse="users are served worse with it",
        unclear="the interval holds 0, so this run does not show whether it helps",
    )
    return f"On {row.split}, the private part adds {_value(row)} {unit}: {verdict}."


def _comparison(row: ResultRow) -> str:
    verdict = _verdict(
        row,
        better="does better than",
        worse="does worse than",
        unclear="does not differ clearly from",
    )
    name, judged = row.metric.removeprefix(OVER), _JUDGED[Mode(row.mode)]
    return f"On {row.split}, {judged} {verdict} {name}: {_value(row)} NDCG@{row.k}."


def _verdict(row: ResultRow, better: str, worse: str, unclear: str) -> str:
    found = Estimate(row.value, row.ci_low, row.ci_high, row.num_users)
    if found.is_positive:
        return better
    return worse if found.is_negative else unclear


def _value(row: ResultRow) -> str:
    return f"{row.value:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
