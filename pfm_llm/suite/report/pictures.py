"""The plots of a suite's results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.base import files
from pfm_llm.runs import plots
from pfm_llm.suite.report.reading import SuiteResult, by_run
from pfm_llm.suite.report.tables import Column, columns_of, mean_figures, summary_lines

_CURVE = re.compile(
    r"(?P<name>memory|cold_start)(_(?P<quality>[a-z_]+?))?_(?P<x>\d+)(_(?P<part>shared|own))?"
)
_CURVE_TEXTS = {
    "memory": ("Memory: fewer items in the prompt", "Items that the prompt shows"),
    "cold_start": ("Cold start: fewer interactions known", "Interactions given"),
}
_CURVE_CAPTIONS = {
    "memory": "What a private part adds when the prompt shows fewer items",
    "cold_start": "What a private part adds when few interactions of a user are known",
}
_QUALITY_TEXTS = {"": "-log rank", "log_rank": "-log rank", "ndcg": "NDCG@10", "auc": "AUC"}
_GAIN = "gain_log_rank"
_MAX_REFERENCES = 3


@dataclass(frozen=True)
class Picture:
    """A plot of the page.

    Attributes:
        path: The PNG.
        caption: Sentences on it.
        alt: What it shows, for a reader who does not see it.
    """

    path: Path
    caption: str
    alt: str


def draw(results: Sequence[SuiteResult], folder: Path) -> list[Picture]:
    """Draw every plot that has figures, and delete older plots that have none.

    Args:
        results: All results of a suite with one budget.
        folder: The folder of the PNG files.

    Returns:
        The plots, in the order to show them.

    Raises:
        StorageError: A file cannot be written or deleted.
    """
    drawn = [*_draw_bytes(results, folder), *_draw_histograms(results, folder)]
    drawn += _draw_curves(results, folder)
    with files.storage_errors(folder):
        for path in set(folder.glob("*.png")) - {picture.path for picture in drawn}:
            path.unlink()
    return drawn


def _draw_bytes(results: Sequence[SuiteResult], folder: Path) -> list[Picture]:
    ndcg, *_ = columns_of(results)
    methods: dict[str, plots.Point] = {}
    baselines: dict[str, float] = {}
    for line in summary_lines(results):
        if ndcg not in line.figures or line.leaks:
            continue
        sent, figure = line.mean_cost("bytes_up", "bytes_down"), line.figures[ndcg]
        label = f"{line.label}, {line.regime}" if line.regime else line.label
        if sent is None:
            baselines[label] = figure.value
        else:
            methods[label] = plots.Point(sent, figure.value, figure.low, figure.high)
    best = sorted(baselines, key=lambda name: -baselines[name])[:_MAX_REFERENCES]
    path = folder / "quality_by_bytes.png"
    references = {name: baselines[name] for name in best}
    is_drawn = plots.plot_quality_by_bytes(
        methods, path, y_label=f"{ndcg.heading} on test", references=references
    )
    points = [f"{name} {p.value:.4f} at {p.x / 1e9:.3g} GB" for name, p in methods.items()]
    lines = [f"{name} {value:.4f}" for name, value in references.items()]
    caption = (
        f"{ndcg.heading} on test against all that clients and server send each other in training. "
        "Bars are intervals over users. Lines are the best methods that train on pooled data and "
        "send nothing."
    )
    alt = f"{ndcg.heading} of each method: {'; '.join(points)}. Lines: {'; '.join(lines)}."
    return [Picture(path, caption, alt)] if is_drawn else []


def _draw_histograms(results: Sequence[SuiteResult], folder: Path) -> list[Picture]:
    drawn = []
    for run, own in by_run(results).items():
        gains = _per_user(own[0].extra, _GAIN)
        path = folder / f"gain_{run}.png"
        title = f"{run}, seed {own[0].seed}: what each user gains"
        label = "Gain in log rank: shared + private over shared only"
        if plots.plot_gain_histogram(gains, path, title=title, x_label=label):
            known = gains[np.isfinite(gains)]
            caption = (
                f"What each user of {run}, seed {own[0].seed}, gains from the private part, in "
                "log-rank. Right of 0, the held-out items stand nearer to the top with it."
            )
            alt = (
                f"Histogram of the gains of {len(known)} users: {(known > 0).mean():.0%} gain, "
                f"{(known < 0).mean():.0%} lose, the mean is {known.mean():+.4f}."
            )
            drawn.append(Picture(path, caption, alt))
    return drawn


def _per_user(extra: Mapping[str, Any], metric: str) -> np.ndarray:
    """float64 [users], NaN for a user without a value; empty if the result lacks the metric."""
    values = (extra.get("per_user") or {}).get(metric, [])
    values = values.values() if isinstance(values, Mapping) else values
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _draw_curves(results: Sequence[SuiteResult], folder: Path) -> list[Picture]:
    metrics: dict[tuple[str, str, str], dict[str, dict[int, str]]] = {}
    for result in results:
        for row in result.own_rows:
            match = _CURVE.fullmatch(row.metric)
            if match:
                key = match["name"], match["quality"] or "", row.task
                parts = metrics.setdefault(key, {})
                parts.setdefault(match["part"] or "gain", {})[int(match["x"])] = row.metric
    drawn = []
    for (name, quality, task), parts in sorted(metrics.items()):
        curves = [
            plots.Curve(run, **{part: _points(own, task, xs) for part, xs in parts.items()})
            for run, own in by_run(results).items()
        ]
        title, x_label = _CURVE_TEXTS[name]
        path = folder / f"{'_'.join(filter(None, (name, quality, task)))}.png"
        what = f"{_QUALITY_TEXTS.get(quality, quality)} ({task.replace('_', ' ')})"
        if plots.plot_curves(curves, path, title=title, x_label=x_label, quality=what):
            caption = (
                f"{_CURVE_CAPTIONS[name]}: the quality with and without private parts, where it "
                "was measured, and the gain. Bars are intervals over users."
            )
            drawn.append(Picture(path, caption, f"Gain in {what}. {_gains(curves)}"))
    return drawn


def _gains(curves: Sequence[plots.Curve]) -> str:
    return " ".join(
        f"{curve.label}: {', '.join(f'{p.value:+.3f} at {p.x:g}' for p in curve.gain)}."
        for curve in curves
        if curve.gain
    )


def _points(own: Sequence[SuiteResult], task: str, metrics: Mapping[int, str]) -> list[plots.Point]:
    """By ascending number of items, means over seeds."""
    points = []
    for x in sorted(metrics):
        figure = mean_figures(own, None, Column("", metrics[x], (task,)))
        if figure is not None:
            points.append(plots.Point(x, figure.value, figure.low, figure.high))
    return points
