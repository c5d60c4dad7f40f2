"""The plot of a run's losses: in training, and of each task on validation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pfm_llm.runs import plots
from pfm_llm.runs.plots import BLUE, GREY, MODE_STYLES, Record

_SMOOTH_FROM = 20
"""A run with more rounds also gets a moving mean of its loss."""
_MAX_PASSES = 40
"""More passes than this are no longer told apart, and are not marked."""


@dataclass(frozen=True)
class LossScale:
    """What a loss is to be compared with.

    Attributes:
        num_items: Size of the catalogue; a guess costs ln(items) a next item.
        num_terms: How many losses of the next item the training loss adds: with a private part that
            adds to scores there are two.
        has_likes: Whether the training loss has the loss of likes in it too.
        rounds_per_pass: After so many rounds every client has taken part once more.
    """

    num_items: int
    num_terms: int
    has_likes: bool
    rounds_per_pass: float


def plot_loss(records: Iterable[Record], path: Path, scale: LossScale) -> bool:
    """Draw the training loss of each round, and the loss of each task on validation.

    Args:
        records: Rounds as `metrics_log` reads them; a ``loss`` that is missing or ``None`` is
            skipped.
        path: The PNG to write.
        scale: What the losses are compared with.

    Returns:
        Whether there was anything to draw.

    Raises:
        StorageError: The file cannot be written.
    """
    records = list(records)
    losses = pd.Series({r["round"]: r["loss"] for r in records if plots.is_number(r.get("loss"))})
    if losses.empty:
        return False
    choices = {"next_item_loss": scale.num_items, "like_loss": 2}
    titles = {"next_item_loss": "Next item, validation", "like_loss": "Likes, validation"}
    validated = [record for record in records if record.get("validation")]
    found = {
        name: {mode: plots.points_of(validated, mode, name) for mode in MODE_STYLES}
        for name in choices
    }
    found = {name: series for name, series in found.items() if any(series.values())}
    figure = plots.new_figure(1.0 + 0.7 * len(found))
    widths = [1.2, *(1.0 for _ in found)]
    first, *others = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _draw_training(first, losses, scale)
    for axes, (name, series) in zip(others, found.items(), strict=True):
        plots.style(axes, titles[name], "Round", "Loss (nats per held-out item)")
        plots.draw_modes(axes, series)
        _draw_guess(axes, choices[name])
        _legend(axes)
    plots.save(figure, path)
    return True


def _draw_training(axes: Axes, losses: "pd.Series[float]", scale: LossScale) -> None:
    terms = ["next item", "next item with the private part"][: scale.num_terms]
    terms += ["likes"] if scale.has_likes else []
    title = "Training loss" + (", a sum" if len(terms) > 1 else "")
    plots.style(axes, title, "Round", "Loss (nats per prediction)")
    name = f"the round's cohort: {' + '.join(terms)}"
    width = len(losses) // 10
    if len(losses) < _SMOOTH_FROM:
        axes.plot(losses, color=BLUE, marker="o", markersize=4, label=name)
    else:
        axes.plot(losses, color=BLUE, alpha=0.35, linewidth=1, label=name)
        smooth, label = losses.rolling(width).mean().dropna(), f"mean of the last {width} rounds"
        axes.plot(smooth, color=BLUE, linewidth=2, label=label)
    _draw_guess(axes, scale.num_items, scale.num_terms)
    passes = np.arange(1, losses.index.max() / scale.rounds_per_pass)
    for n, number in enumerate(passes[:_MAX_PASSES]):
        label = "_" if n else "every client has been met once more, hence the steps"
        place = number * scale.rounds_per_pass
        axes.axvline(place, color=GREY, linewidth=0.8, alpha=0.6, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _legend(axes: Axes) -> None:
    """A legend below the plot, where it covers nothing."""
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _draw_guess(axes: Axes, num_choices: int, times: int = 1) -> None:
    """The loss of a guess among so many choices, as a line."""
    value, factor = times * math.log(num_choices), f"{times} × " if times > 1 else ""
    label = f"a uniform guess: {factor}ln {num_choices:,} = {value:.2f}"
    axes.axhline(value, color="black", linewidth=1, linestyle="--", label=label)
