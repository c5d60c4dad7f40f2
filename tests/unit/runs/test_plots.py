"""Plots: written whole when there is something to draw, nothing otherwise."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from pfm_llm.base.errors import StorageError
from pfm_llm.runs import plots
from pfm_llm.runs.loss_plot import LossScale, plot_loss
from pfm_llm.runs.plots import (
    Curve,
    Point,
    plot_curves,
    plot_gain_histogram,
    plot_modes_by_round,
    plot_quality_by_bytes,
    plot_user_gain,
)

SCALE = LossScale(num_items=100, num_terms=2, has_likes=False, rounds_per_pass=10.0)
COHORT = "the round's cohort: next item + next item with the private part"
GAIN = (Point(4, 0.2, 0.1, 0.3), Point(32, 0.1, 0.0, 0.2))
HISTOGRAM = {"title": "Gains", "x_label": "Gain"}
CURVES = {"title": "Memory", "x_label": "Items", "quality": "NDCG@10"}


def by_bytes(path: Path, *sent: float, references: dict[str, float] | None = None) -> bool:
    methods = {f"m{n}": Point(x, 0.1, 0.05, 0.2) for n, x in enumerate(sent)}
    return plot_quality_by_bytes(methods, path, y_label="NDCG@10", references=references or {})


MODES = ("zero_shot", "shared_only", "private_only", "shared_private")


def losses(*values: float | None) -> list[dict]:
    return [{"round": n, "loss": value} for n, value in enumerate(values, start=1)]


def validated(rounds: int) -> list[dict]:
    return [
        {
            "round": n,
            "loss": 1.0,
            "validation": {mode: {"ndcg@10": 0.01 * n, "hit_rate@10": 0.1} for mode in MODES},
        }
        for n in range(1, rounds + 1)
    ]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved, for a look at what they hold."""
    seen: list[Figure] = []
    save = plots.save

    def spy(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save", spy)
    return seen


def drawn_lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = figure.axes[0].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_loss(losses(7.0, 6.5), path, SCALE),
        lambda path: plot_modes_by_round(validated(2), path),
        lambda path: plot_user_gain(np.array([0.1, -0.1, 0.0]), path),
        lambda path: by_bytes(path, 1e9),
        lambda path: plot_gain_histogram(np.array([0.1, -0.1, 0.0]), path, **HISTOGRAM),
        lambda path: plot_curves([Curve("pfm", GAIN)], path, **CURVES),
        lambda path: plot_curves([Curve("pfm", GAIN, GAIN, GAIN)], path, **CURVES),
    ],
)
def test_a_plot_is_a_png_with_a_picture_title_and_labelled_axes(tmp_path, figures, draw) -> None:
    path = tmp_path / "plots" / "a.png"
    assert draw(path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels[..., :3].std() > 0.01
    assert [child.name for child in path.parent.iterdir()] == ["a.png"]
    axes = figures[0].axes[0]
    assert all([axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()])


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_loss([], path, SCALE),
        lambda path: plot_loss([{"round": 1}, {"round": 2, "loss": None}], path, SCALE),
        lambda path: plot_loss(losses(float("nan")), path, SCALE),
        lambda path: plot_modes_by_round([], path),
        lambda path: plot_modes_by_round(losses(1.0), path),
        lambda path: plot_modes_by_round([{"round": 1, "validation": {}}], path),
        lambda path: plot_modes_by_round([{"round": 1, "validation": {"shared_only": {}}}], path),
        lambda path: plot_user_gain(np.array([]), path),
        lambda path: plot_user_gain(np.array([np.nan]), path),
        lambda path: by_bytes(path),
        lambda path: plot_gain_histogram(np.array([np.nan]), path, **HISTOGRAM),
        lambda path: plot_gain_histogram(np.array([]), path, **HISTOGRAM),
        lambda path: plot_curves([], path, **CURVES),
        lambda path: plot_curves([Curve("pfm", ())], path, **CURVES),
    ],
)
def test_nothing_to_draw_writes_nothing(tmp_path, draw) -> None:
    assert not draw(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_single_point_is_visible_by_its_marker(tmp_path, figures) -> None:
    plot_loss(losses(7.0), tmp_path / "loss.png", SCALE)
    plot_modes_by_round(validated(1), tmp_path / "modes.png")
    lines = [line for figure in figures for line in figure.axes[0].get_lines()]
    lines = [line for line in lines if not line.get_label().startswith("a uniform guess")]
    assert len(lines) == 1 + len(MODES)
    assert all(line.get_marker() not in (None, "None", "") for line in lines)


def test_loss_skips_rounds_without_one(tmp_path, figures) -> None:
    plot_loss(losses(7.0, None, float("nan"), 6.0), tmp_path / "loss.png", SCALE)
    rounds, values = drawn_lines(figures[0])[COHORT]
    assert (rounds, values) == ([1, 4], [7.0, 6.0])


def test_a_long_loss_has_a_moving_mean_of_past_rounds(tmp_path, figures) -> None:
    plot_loss(losses(*map(float, range(1, 31))), tmp_path / "loss.png", SCALE)
    lines = drawn_lines(figures[0])
    rounds, values = lines["mean of the last 3 rounds"]
    assert rounds == list(range(3, 31))
    # The mean of losses n-2, n-1, n is n-1.
    assert values == pytest.approx([n - 1 for n in range(3, 31)])
    assert lines[COHORT][1] == list(range(1, 31))


def test_the_loss_stands_beside_a_guess_and_the_passes_over_the_clients(tmp_path, figures) -> None:
    """Two losses of 100 items: a guess costs 2 ln 100 = 9.21. Passes end at 10 and 20."""
    plot_loss(losses(*[8.0] * 25), tmp_path / "loss.png", SCALE)
    lines = drawn_lines(figures[0])
    guess = "a uniform guess: 2 × ln 100 = 9.21"
    assert lines[guess][1] == pytest.approx([2 * np.log(100)] * 2)
    passes = [x for label, (x, _) in lines.items() if "met once more" in label]
    assert passes == [[10, 10]]
    vertical = [line for line in figures[0].axes[0].get_lines() if line.get_xdata()[0] == 20]
    assert len(vertical) == 1
    assert COHORT in lines
    assert figures[0].axes[0].get_title(loc="left") == "Training loss, a sum"


def test_each_task_has_its_loss_on_validation_beside_its_own_guess(tmp_path, figures) -> None:
    figure = {"next_item_loss": 3.0, "like_loss": 0.6, "ndcg@10": 0.1}
    records = [{"round": 2, "loss": 7.0, "validation": {"shared_only": figure}}]
    plot_loss(records, tmp_path / "loss.png", SCALE)
    _, next_item, like = figures[0].axes
    found = [
        {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        for axes in (next_item, like)
    ]
    assert found[0]["shared only"] == [3.0]
    assert found[0]["a uniform guess: ln 100 = 4.61"] == pytest.approx([np.log(100)] * 2)
    assert found[1]["shared only"] == [0.6]
    assert found[1]["a uniform guess: ln 2 = 0.69"] == pytest.approx([np.log(2)] * 2)


def test_no_two_series_of_forty_look_alike_even_in_grey(tmp_path, figures) -> None:
    by_bytes(tmp_path / "a.png", *[1e9] * 40)
    lines = [container.lines[0] for container in figures[0].axes[0].containers]
    looks = {(line.get_marker(), line.get_markerfacecolor() == "white") for line in lines}
    assert len(looks) == 40


def test_modes_are_drawn_at_the_rounds_where_they_were_validated(tmp_path, figures) -> None:
    records = [
        {"round": 1, "loss": 1.0},
        {"round": 5, "validation": {"shared_only": {"ndcg@10": 0.02}}},
        {
            "round": 10,
            "validation": {
                "shared_only": {"ndcg@10": 0.03},
                "shared_private": {"ndcg@10": 0.04},
                "zero_shot": {"ndcg@10": None},
            },
        },
    ]
    plot_modes_by_round(records, tmp_path / "modes.png")
    lines = drawn_lines(figures[0])
    assert set(lines) == {"shared only", "shared + private"}
    assert lines["shared only"] == ([5, 10], [0.02, 0.03])
    assert lines["shared + private"] == ([10], [0.04])


def test_user_gain_counts_who_gains_and_who_loses(tmp_path, figures) -> None:
    # 1 of 4 worse, 2 of 4 better, 1 unchanged; mean (-0.2 + 0 + 0.1 + 0.3) / 4 = 0.05.
    gains = np.array([0.3, -0.2, 0.0, 0.1, np.nan])
    plot_user_gain(gains, tmp_path / "gain.png")
    axes = figures[0].axes[0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "worse: 25 % of users",
        "better: 50 % of users",
        "unchanged: 25 % of users",
    }
    assert "mean +0.0500 over 4 users" in axes.get_title(loc="left")


def test_one_user_is_enough(tmp_path) -> None:
    assert plot_user_gain(np.array([0.0]), tmp_path / "gain.png")


@pytest.mark.parametrize(
    ("sent", "scale"), [([1e9, 30e9], "log"), ([1e9, 3e9], "linear"), ([0.0, 30e9], "linear"),
                        ([0.0], "linear")]
)  # fmt: skip
def test_bytes_of_very_different_size_stand_on_a_logarithmic_axis(
    tmp_path, figures, sent, scale
) -> None:
    assert by_bytes(tmp_path / "a.png", *sent, references={"ease": 0.08})
    axes = figures[0].axes[0]
    assert axes.get_xscale() == scale
    # In GB, with the interval as an error bar.
    assert [float(c.lines[0].get_xdata()[0]) for c in axes.containers] == [x / 1e9 for x in sent]
    assert axes.containers[0].has_yerr
    (ends,) = axes.containers[0].lines[2][0].get_segments()
    assert ends[:, 1].tolist() == pytest.approx([0.05, 0.2])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == sorted([*(f"m{n}" for n in range(len(sent))), "ease"])


def test_a_histogram_holds_every_user_once_and_parts_at_zero(tmp_path, figures) -> None:
    """1 of 4 worse, 2 of 4 better, 1 unchanged and in no bar; mean 0.05."""
    gains = np.array([0.3, -0.2, 0.0, 0.1, np.nan])
    plot_gain_histogram(gains, tmp_path / "a.png", **HISTOGRAM)
    axes = figures[0].axes[0]
    worse, better = axes.containers
    assert sum(bar.get_height() for bar in worse) == 1
    assert sum(bar.get_height() for bar in better) == 2
    edges = {round(bar.get_x(), 6) for bar in worse}
    assert 0.0 in edges
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "worse: 25 % of users",
        "better: 50 % of users",
        "mean +0.0500",
    }


def test_curves_show_the_gain_and_beside_it_both_qualities(tmp_path, figures) -> None:
    own, shared = (Point(4, 0.6, 0.5, 0.7),), (Point(4, 0.4, 0.3, 0.5),)
    curves = [Curve("a", GAIN, own, shared), Curve("b", GAIN[:1]), Curve("c", ())]
    plot_curves(curves, tmp_path / "a.png", **CURVES)
    quality, gain = figures[0].axes
    assert [container.get_label() for container in gain.containers] == ["a", "b"]
    assert gain.get_xticks().tolist() == [4, 32]
    with_private, without = (container.lines[0] for container in quality.containers)
    assert (with_private.get_ydata().tolist(), with_private.get_linestyle()) == ([0.6], "-")
    assert (without.get_ydata().tolist(), without.get_linestyle()) == ([0.4], "--")


def test_a_mean_a_hair_outside_its_interval_is_drawn(tmp_path) -> None:
    points = [Point(1, 0.1, 0.1000001, 0.2)]
    assert plot_curves([Curve("a", points)], tmp_path / "a.png", **CURVES)


def test_a_plot_that_cannot_be_written_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "plots").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"a\.png"):
        plot_loss(losses(1.0), tmp_path / "plots" / "a.png", SCALE)


def test_no_global_plotting_state_is_used() -> None:
    source = Path(plots.__file__).read_text()
    assert "import matplotlib.pyplot" not in source
    assert "from matplotlib import pyplot" not in source
    assert "matplotlib.use" not in source
