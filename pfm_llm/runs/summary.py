"""The findings of a run in sentences: the gain of its private part, and comparisons."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pfm_llm.evaluation.comparison import OVER
from pfm_llm.evaluation.personality.significance import ROUNDING, over_seeds, settled
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.protocol.types import Mode
from pfm_llm.server.privacy.mechanism import Spent

COMPARISONS, GAINS = "comparisons", "gains"
"""Keys of ``results.json``: rows of differences, see `comparison.rows_over` and `gain_rows`."""

PRIVATE_WEIGHT = "private_weight"
"""Key of ``results.json``: the weight of the private part; absent without a private part."""

_PRIVACY = "privacy"
"""Key of ``results.json``: the fields of `Spent`; absent without ``federation.privacy``."""

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
    level = results.get("config", {}).get("evaluation", {}).get("confidence", 0.95)
    if gains and not results.get(PRIVATE_WEIGHT):
        lines.append("The private part adds nothing: it is left out, at a weight of 0.")
        gains = []
    claimed = [*gains, *comparisons]
    sure = settled({row: over_seeds([row], level) for row in claimed}, level)
    lines += [_gain(row, row in sure) for row in gains]
    lines += [_comparison(row, row in sure) for row in comparisons]
    if lines:
        corrected = ""
        if len(claimed) > 1:
            corrected = f" Better and worse hold after Holm's correction for {len(claimed)} tests."
        lines.append(
            f"These are mean differences over the same users, with {level * 100:g} % intervals; a "
            f"positive one is better for the user.{corrected}"
        )
    costs = results.get("costs", {})
    return lines + _spent(results.get(_PRIVACY), costs) + _refused(costs)


def as_entry(spent: Spent | None) -> dict[str, Any]:
    """What a run has spent, as an entry of ``results.json``; empty without a guarantee."""
    return {} if spent is None else {_PRIVACY: dataclasses.asdict(spent)}


def refused_by_reason(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many updates were refused for each reason, over the records of rounds."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.get("refused_by_reason", {}))
    return dict(total)


def _spent(privacy: Mapping[str, Any] | None, costs: Mapping[str, Any]) -> list[str]:
    """A line about the privacy of users, and one if the budget ended the run."""
    if privacy is None:
        return []
    lines = [
        f"The shared part is ({privacy['epsilon']:.3g}, {privacy['delta']:.3g})-differentially "
        "private for each user; the figures here are not."
    ]
    rounds, planned = costs.get("rounds", 0), privacy["planned_rounds"]
    if privacy["budget"] is not None and rounds < planned:
        lines.append(
            f"The budget of ε, {privacy['budget']:g}, ended the run after {rounds} of {planned} "
            "rounds."
        )
    return lines


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


def _gain(row: ResultRow, is_settled: bool) -> str:
    unit = _UNITS[row.metric].format(percent=100 * math.exp(-row.value), k=row.k)
    verdict = _verdict(
        row,
        is_settled,
        better="users are served better with it",
        worse="users are served worse with it",
        unclear="this run does not show whether it helps",
    )
    verdict += _otherwise(row, is_settled)
    return f"On {row.split}, the private part adds {_value(row)} {unit}: {verdict}."


def _comparison(row: ResultRow, is_settled: bool) -> str:
    verdict = _verdict(
        row,
        is_settled,
        better="does better than",
        worse="does worse than",
        unclear="does not differ clearly from",
    )
    name, judged = row.metric.removeprefix(OVER), _JUDGED[Mode(row.mode)]
    figure = f"{_value(row)} NDCG@{row.k}{_otherwise(row, is_settled)}"
    return f"On {row.split}, {judged} {verdict} {name}: {figure}."


def _verdict(row: ResultRow, is_settled: bool, better: str, worse: str, unclear: str) -> str:
    if not is_settled:
        return unclear
    return better if row.value > 0 else worse


def _otherwise(row: ResultRow, is_settled: bool) -> str:
    """A remark where the interval, which is not corrected, contradicts the verdict."""
    leaves_out_zero = row.ci_low > ROUNDING or row.ci_high < -ROUNDING
    return "" if leaves_out_zero == is_settled else " (the interval alone says otherwise)"


def _value(row: ResultRow) -> str:
    return f"{row.value:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
