"""Versions as plain tables for people, and as JSON trees for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pfm_llm.base.terminal import harmless
from pfm_llm.publish.manifest import Metric
from pfm_llm.publish.versions.chain import ChainReport
from pfm_llm.publish.versions.difference import Change, MetricChange, VersionDiff
from pfm_llm.publish.versions.history import Version

_SHORT = 12


def versions_text(versions: Sequence[Version]) -> str:
    """A table of versions, with their problems below it."""
    if not versions:
        return "no versions: no commit has a manifest"
    names = {version.headline.metric for version in versions if version.headline}
    shared = min(names) if len(names) == 1 else "ndcg"
    rows = [
        [
            version.commit[:_SHORT],
            f"{version.date:%Y-%m-%d %H:%M}",
            ", ".join(version.tags) or "-",
            "?" if version.round is None else str(version.round),
            version.name or "?",
            _headline(version.headline, shared),
            version.manifest_sha256[:_SHORT] or "?",
            ", ".join(f"{p.relation} {(p.revision or p.repo)[:_SHORT]}" for p in version.parents)
            or "-",
            version.signed_by or "-",
        ]
        for version in versions
    ]
    before, after = ["commit", "date", "tags", "round", "run"], ["manifest", "parents", "signed by"]
    wrong = [harmless(f"{v.commit[:_SHORT]}: {v.problem}") for v in versions if v.problem]
    return "\n".join([_table([*before, shared.upper(), *after], rows), *wrong])


def versions_tree(versions: Sequence[Version]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "commit": version.commit,
            "date": version.date.isoformat(),
            "title": version.title,
            "tags": list(version.tags),
            "round": version.round,
            "name": version.name,
            "manifest_sha256": version.manifest_sha256,
            "headline": version.headline and version.headline.model_dump(mode="json"),
            "parents": [parent.model_dump(mode="json") for parent in version.parents],
            "signed_by": version.signed_by,
            "problem": version.problem,
        }
        for version in versions
    ]


def diff_text(diff: VersionDiff) -> str:
    """Tables of what changed."""
    items = f"{diff.num_items} items in both, {diff.num_new} new, {diff.num_gone} gone"
    parts = [f"{diff.older} -> {diff.newer}", items]
    for title, changes in (
        ("effective weights, by layer", diff.layers),
        ("effective weights, by module", diff.modules),
        ("head", diff.tensors),
    ):
        parts.append(_changes_text(title, changes))
    metrics = [_metric_row(change) for change in diff.metrics]
    parts.append(_table(["metric", "mode", "older", "newer", "change"], metrics))
    settings = [[s.name, str(s.older), str(s.newer)] for s in diff.settings]
    parts.append(
        _table(["setting", "older", "newer"], settings) if settings else "settings: the same"
    )
    return "\n\n".join(parts)


def diff_tree(diff: VersionDiff) -> dict[str, Any]:
    """The same for programs."""
    metrics = [
        {
            "mode": change.mode,
            "metric": change.metric,
            "older": change.older and change.older.model_dump(mode="json"),
            "newer": change.newer and change.newer.model_dump(mode="json"),
            "difference": change.difference,
        }
        for change in diff.metrics
    ]
    return {**asdict(diff), "metrics": metrics}


def chain_text(report: ChainReport) -> str:
    """A line per version with its problems and unchecked points below it, and the result."""
    lines = []
    for checked in report.versions:
        version = checked.version
        state = "WRONG" if checked.problems else "ok"
        signed = f"signed by {version.signed_by}" if version.signed_by else "not signed"
        name = harmless(str(version.name))
        lines.append(
            f"{version.commit[:_SHORT]}  {state:5}  round {version.round}  {name}  {signed}"
        )
        lines += [f"    wrong: {harmless(problem)}" for problem in checked.problems]
        lines += [f"    note: {harmless(note)}" for note in checked.notes]
    count = len(report.versions)
    outcome = (
        f"{report.repo} at {report.revision}: {count} version(s), the chain is whole"
        if report.is_whole
        else f"{report.repo} at {report.revision}: {len(report.problems)} problem(s)"
    )
    return "\n".join([*lines, outcome])


def chain_tree(report: ChainReport) -> dict[str, Any]:
    """The same for programs."""
    return {
        "repo": report.repo,
        "revision": report.revision,
        "trusted_key": report.trusted_key,
        "whole": report.is_whole,
        "versions": [
            {
                **versions_tree([checked.version])[0],
                "problems": list(checked.problems),
                "notes": list(checked.notes),
            }
            for checked in report.versions
        ],
    }


def _changes_text(title: str, changes: Sequence[Change]) -> str:
    rows = [
        [
            change.name,
            _number(change.norm),
            _number(change.older_norm),
            "-" if change.relative is None else f"{change.relative:.2%}",
            change.note,
        ]
        for change in changes
    ]
    return _table([title, "norm of change", "norm before", "relative", ""], rows)


def _metric_row(change: MetricChange) -> list[str]:
    difference = "-" if change.difference is None else f"{change.difference:+.4f}"
    return [change.metric, change.mode, _figure(change.older), _figure(change.newer), difference]


def _headline(metric: Metric | None, heading: str) -> str:
    """The figure, with its cut-off where the heading does not state it."""
    cut_off = metric.metric.removeprefix(heading) if metric else ""
    return f"{_figure(metric)} {cut_off}".rstrip()


def _figure(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    return f"{metric.value:.4f} [{metric.ci_low:.4f}, {metric.ci_high:.4f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)
