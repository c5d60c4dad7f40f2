"""The pictures of a run: loss, quality of each mode by round, gain of each user.

Figures are drawn by matplotlib's objects on an Agg canvas, never by ``pyplot``: no global state,
no display. Every function returns whether it had something to draw; without data it writes
nothing. Colours are those of Okabe and Ito, told apart by colour-blind readers too, and every
series also has a marker of its own.
"""

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pfm_llm.files import write_bytes
from pfm_llm.types import Mode

Record = Mapping[str, Any]

_BLUE, _ORANGE, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
_MODE_STYLES = {
    Mode.ZERO_SHOT: (_GREY, "s", "zero shot"),
    Mode.SHARED_ONLY: (_BLUE, "o", "shared only"),
    Mode.PRIVATE_ONLY: (_PURPLE, "^", "private only"),
    Mode.SHARED_PRIVATE: (_ORANGE, "D", "shared + private"),
}
_METRIC_NAMES = {"ndcg": "NDCG", "hit_rate": "Hit rate", "mrr": "MRR"}
_REFERENCE_LINES = ("--", ":", "-.")
_SIZE_INCHES = (7.2, 4.2)
_DPI = 150
_SMOOTH_FROM = 20
"""Shorter runs are shown as they are; longer ones with a moving mean on top."""


def plot_loss(records: Iterable[Record], path: Path) -> bool:
    """Draw the training loss of each round.

    Args:
        records: Rounds as `metrics_log` reads them; a ``loss`` that is missing or ``None`` is
            skipped.
        path: The PNG to write.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    points = [(r["round"], r["loss"]) for r in records if _is_number(r.get("loss"))]
    if not points:
        return False
    rounds, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    figure, axes = _new_axes("Training loss", "Round", "Loss of the cohort (nats per prediction)")
    width = len(losses) // 10
    if len(losses) < _SMOOTH_FROM:
        axes.plot(rounds, losses, color=_BLUE, marker="o", markersize=4)
    else:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(rounds, losses, color=_BLUE, alpha=0.35, linewidth=1, label="each round")
        label = f"mean of the last {width} rounds"
        axes.plot(rounds[width - 1 :], smooth, color=_BLUE, linewidth=2, label=label)
        axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)
    return True


def plot_modes_by_round(
    records: Iterable[Record],
    path: Path,
    *,
    metric: str = "ndcg@10",
    references: Mapping[str, float] | None = None,
) -> bool:
    """Draw a validation metric of each mode over the rounds that were validated.

    Args:
        records: Rounds as `metrics_log` reads them; those without ``validation`` are skipped.
        path: The PNG to write.
        metric: Which entry of ``validation[mode]`` to draw.
        references: Name to value of baselines, on validation too, drawn as horizontal lines.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    validated = [record for record in records if record.get("validation")]
    series = {mode: _points(validated, mode, metric) for mode in _MODE_STYLES}
    if not any(series.values()):
        return False
    name = _metric_name(metric)
    figure, axes = _new_axes(f"Validation {name} of each mode", "Round", f"{name}, full catalogue")
    for mode, (color, marker, label) in _MODE_STYLES.items():
        if series[mode]:
            rounds, values = zip(*series[mode], strict=True)
            axes.plot(rounds, values, color=color, marker=marker, markersize=5, label=label)
    for index, (label, value) in enumerate((references or {}).items()):
        dashes = _REFERENCE_LINES[index % len(_REFERENCE_LINES)]
        axes.axhline(value, color="black", linewidth=1, linestyle=dashes, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
    return True


def plot_user_gain(gains: np.ndarray, path: Path, *, metric: str = "ndcg@10") -> bool:
    """Draw what the private adapter gives each user, users ordered by it.

    Args:
        gains: Shape [users], float: the metric of shared + private minus that of shared only.
            Values that are not finite are left out.
        path: The PNG to write.
        metric: What was measured, for the labels.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    finite = np.sort(np.asarray(gains, dtype=float).ravel())
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return False
    better, worse = int((finite > 0).sum()), int((finite < 0).sum())
    share = 100 / finite.size
    name = _metric_name(metric)
    figure, axes = _new_axes(
        f"Gain from the private adapter: mean {finite.mean():+.4f} over {finite.size} users",
        "Users, from largest loss to largest gain (%)",
        f"{name}: shared + private minus shared only",
    )
    edges = np.linspace(0, 100, finite.size + 1)
    for values, color, label in (
        (np.minimum(finite, 0), _ORANGE, f"worse: {worse * share:.0f} % of users"),
        (np.maximum(finite, 0), _BLUE, f"better: {better * share:.0f} % of users"),
    ):
        axes.stairs(values, edges, fill=True, color=color, label=label)
    axes.axhline(
        0,
        color="black",
        linewidth=1,
        label=f"unchanged: {(finite.size - better - worse) * share:.0f} % of users",
    )
    axes.set_xlim(0, 100)
    axes.legend(frameon=False, loc="upper left")
    _save(figure, path)
    return True


def _points(records: Iterable[Record], mode: Mode, metric: str) -> list[tuple[int, float]]:
    found = ((r["round"], r["validation"].get(mode, {}).get(metric)) for r in records)
    return [(number, value) for number, value in found if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _metric_name(metric: str) -> str:
    name, separator, k = metric.partition("@")
    return f"{_METRIC_NAMES.get(name, name)}{separator}{k}"


def _new_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
