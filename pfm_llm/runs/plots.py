"""The plots of a run and of a suite: quality by round and by bytes, gains, curves.

The plots use matplotlib's objects instead of ``pyplot``, so that they need no global state and no
display. Every function returns whether there was data to draw; without data it
writes no file. The colours are those of Okabe and Ito, which colour-blind readers can tell apart,
and every series has its own marker, which is told apart in grey too.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pfm_llm.base.files import write_bytes
from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.protocol.types import Mode

Record = Mapping[str, Any]

BLUE, _ORANGE, _PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
MODE_STYLES = {
    Mode.ZERO_SHOT: (GREY, "s", "zero shot"),
    Mode.SHARED_ONLY: (BLUE, "o", "shared only"),
    Mode.PRIVATE_ONLY: (_PURPLE, "^", "private only"),
    Mode.SHARED_PRIVATE: (_ORANGE, "D", "shared + private"),
}
_COLORS = (BLUE, _ORANGE, "#009E73", _PURPLE, "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", ">", "d")
"""Filled for the first dozen of series, hollow for the next, and then with their number."""
_REFERENCE_LINES = ("--", ":", "-.")
_SIZE_INCHES = (7.2, 4.2)
_DPI = 150
_LEGEND_LINE = 0.25
"""Height of a line of a legend in inches."""
_LOG_BYTES_FROM = 20
"""The axis is logarithmic if one method sends this many times as much as another."""
_BYTES_PER_GB = 1e9


@dataclass(frozen=True)
class Point:
    """A measured value with its interval.

    Attributes:
        x: Its position on the horizontal axis.
        value: The mean.
        low: Lower end of the interval.
        high: Upper end of it.
    """

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A run's quality by number of items, with and without its private parts.

    Attributes:
        label: The run.
        gain: The gain from the private parts, paired over users.
        own: Quality with the private parts; may be empty.
        shared: Quality without them; may be empty.
    """

    label: str
    gain: Sequence[Point]
    own: Sequence[Point] = ()
    shared: Sequence[Point] = ()


def plot_modes_by_round(records: Iterable[Record], path: Path, k: int = HEADLINE_K) -> bool:
    """Draw NDCG on validation of each mode, over the rounds that were validated.

    Args:
        records: Rounds as `metrics_log` reads them; those without ``validation`` are skipped.
        path: The PNG to write.
        k: Cut-off of the validations.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    validated = [record for record in records if record.get("validation")]
    series = {mode: points_of(validated, mode, f"ndcg@{k}") for mode in MODE_STYLES}
    if not any(series.values()):
        return False
    figure, axes = _new_axes(
        f"Validation NDCG@{k} of each mode", "Round", f"NDCG@{k}, full catalogue"
    )
    draw_modes(axes, series)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
    return True


def plot_user_gain(gains: np.ndarray, path: Path, k: int = HEADLINE_K) -> bool:
    """Draw each user's gain from the private part, users ordered by it.

    Args:
        gains: float [users]: NDCG of shared + private minus that of shared only. Values that
            are not finite are left out.
        path: The PNG to write.
        k: Cut-off of the NDCG.

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
    figure, axes = _new_axes(
        f"Gain from the private adapter: mean {finite.mean():+.4f} over {finite.size} users",
        "Users, from largest loss to largest gain (%)",
        f"NDCG@{k}: shared + private minus shared only",
    )
    edges = np.linspace(0, 100, finite.size + 1)
    for values, color, label in (
        (np.minimum(finite, 0), _ORANGE, f"worse: {worse * share:.0f} % of users"),
        (np.maximum(finite, 0), BLUE, f"better: {better * share:.0f} % of users"),
    ):
        axes.stairs(values, edges, fill=True, color=color, label=label)
    unchanged = (finite.size - better - worse) * share
    axes.axhline(0, color="black", linewidth=1, label=f"unchanged: {unchanged:.0f} % of users")
    axes.set_xlim(0, 100)
    axes.legend(frameon=False, loc="upper left")
    save(figure, path)
    return True


def plot_quality_by_bytes(
    methods: Mapping[str, Point], path: Path, *, y_label: str, references: Mapping[str, float]
) -> bool:
    """Draw the quality of each method against the bytes that it sends.

    Args:
        methods: Label to quality; ``x`` is in bytes, up and down, over all clients and rounds.
        path: The PNG to write.
        y_label: Name of the quality.
        references: Name to value of baselines, which send nothing, as horizontal lines.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    if not methods:
        return False
    figure, axes = _new_axes("Quality against communication", "Sent in all (GB)", y_label)
    figure.set_figheight(max(figure.get_figheight(), _LEGEND_LINE * len({**methods, **references})))
    for index, (label, point) in enumerate(methods.items()):
        gigabytes = Point(point.x / _BYTES_PER_GB, point.value, point.low, point.high)
        _draw_points(axes, [gigabytes], index, label, line="none")
    for index, (label, value) in enumerate(references.items()):
        dashes = _REFERENCE_LINES[index % len(_REFERENCE_LINES)]
        axes.axhline(value, color="black", linewidth=1, linestyle=dashes, label=label)
    sent = [point.x for point in methods.values()]
    if min(sent) > 0 and max(sent) / min(sent) > _LOG_BYTES_FROM:
        axes.set_xscale("log")
    else:
        # Beyond the axis, so that the marker of a method that sends nothing is whole.
        axes.set_xlim(left=-0.03 * max(sent) / _BYTES_PER_GB if max(sent) > 0 else None)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
    return True


def plot_gain_histogram(gains: np.ndarray, path: Path, *, title: str, x_label: str) -> bool:
    """Draw a histogram of the users' gains.

    Args:
        gains: float [users]; positive is better. Values that are not finite are left out.
        path: The PNG to write.
        title: Title of the plot.
        x_label: Name and unit of the gain.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    finite = np.asarray(gains, dtype=float).ravel()
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return False
    figure, axes = _new_axes(title, x_label, "Users")
    # Bins of equal width with an edge at 0, so that no bar holds both winners and losers.
    reach = max(float(np.abs(finite).max()), 1e-9)
    edges = np.linspace(-reach, reach, 2 * min(20, max(4, math.isqrt(finite.size))) + 1)
    for values, color, label in (
        (finite[finite < 0], _ORANGE, "worse"),
        (finite[finite > 0], BLUE, "better"),
    ):
        share = 100 * values.size / finite.size
        axes.hist(
            values, bins=edges.tolist(), color=color, label=f"{label}: {share:.0f} % of users"
        )
    mean = float(finite.mean())
    axes.axvline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:+.4f}")
    axes.legend(frameon=False)
    save(figure, path)
    return True


def plot_curves(
    curves: Sequence[Curve], path: Path, *, title: str, x_label: str, quality: str
) -> bool:
    """Draw quality with and without private parts, and the gain, by number of items.

    Args:
        curves: One for each run; those without points are left out.
        path: The PNG to write.
        title: Title of the plot.
        x_label: Name of the number that varies.
        quality: Name of the quality.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    curves = [curve for curve in curves if curve.gain]
    if not curves:
        return False
    has_quality = any(curve.own or curve.shared for curve in curves)
    figure = new_figure(1.6 if has_quality else 1.0)
    *first, last = figure.subplots(1, 1 + has_quality, squeeze=False)[0]
    style(last, title, x_label, f"Gain in {quality}, with interval")
    last.axhline(0, color="black", linewidth=1)
    for axes in first:
        style(axes, "With (—) and without (- -) private adapters", x_label, quality)
    for index, curve in enumerate(curves):
        _draw_points(last, curve.gain, index, curve.label)
        for axes in first:
            _draw_points(axes, curve.own, index, None)
            _draw_points(axes, curve.shared, index, None, line="--")
    for axes in (*first, last):
        axes.set_xticks(sorted({point.x for curve in curves for point in curve.gain}))
    last.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
    return True


def draw_modes(axes: Axes, series: Mapping[Mode, Sequence[tuple[int, float]]]) -> None:
    """Draw a line for each mode that has points (round, value)."""
    for mode, (color, marker, label) in MODE_STYLES.items():
        if series[mode]:
            rounds, values = zip(*series[mode], strict=True)
            axes.plot(rounds, values, color=color, marker=marker, markersize=5, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_points(
    axes: Axes, points: Sequence[Point], index: int, label: str | None, line: str = "-"
) -> None:
    """Draw a series in the style of its index; an empty series is left out."""
    if not points:
        return
    style = _style_of(index)
    # Rounding may leave a mean a hair outside its interval, which matplotlib refuses.
    below = [max(point.value - point.low, 0.0) for point in points]
    above = [max(point.high - point.value, 0.0) for point in points]
    axes.errorbar(
        [point.x for point in points],
        [point.value for point in points],
        yerr=[below, above],
        **style,
        linestyle=line,
        elinewidth=1,
        capsize=2,
        label=label,
    )


def _style_of(index: int) -> dict[str, Any]:
    """Colour and marker of a series; no two series have the same pair."""
    cycle, place = divmod(index, len(_MARKERS))
    # A third dozen and later ones show a number, which says more than another shape.
    marker = _MARKERS[place] if cycle < 2 else f"${index + 1}$"
    color = _COLORS[index % len(_COLORS)]
    fill = "white" if cycle == 1 else color
    return {"color": color, "marker": marker, "markersize": 7, "markerfacecolor": fill}


def points_of(records: Iterable[Record], mode: Mode, figure: str) -> list[tuple[int, float]]:
    """Round and value of a figure of one mode, in the records of validated rounds."""
    found = ((r["round"], r["validation"].get(mode, {}).get(figure)) for r in records)
    return [(number, value) for number, value in found if is_number(value)]


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _new_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = new_figure()
    axes = figure.add_subplot()
    style(axes, title, x_label, y_label)
    return figure, axes


def new_figure(widths: float = 1.0) -> Figure:
    """A figure without axes; ``widths`` is a factor of the usual width."""
    width, height = _SIZE_INCHES
    return Figure(figsize=(width * widths, height), dpi=_DPI, layout="constrained")


def style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give axes their texts and the style of all plots."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        StorageError: The file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
