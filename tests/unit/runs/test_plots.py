"""Plots: written whole when there is something to draw, nothing otherwise."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from pfm_llm.base.errors import StorageError
from pfm_llm.runs import plots
from pfm_llm.runs.plots import (
    Curve,
    Point,
    plot_curves,
    plot_gain_histogram,
    plot_loss,
    plot_modes_by_round,
    plot_quality_by_bytes,
    plot_user_gain,
)

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
    save = plots._save

    def spy(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", spy)
    return seen


def drawn_lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = figure.axes[0].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_loss(losses(7.0, 6.5), path),
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
        lambda path: plot_loss([], path),
        lambda path: plot_loss([{"round": 1}, {"round": 2, "loss": None}], path),
        lambda path: plot_loss(losses(float("nan")), path),
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
    plot_loss(losses(7.0), tmp_path / "loss.png")
    plot_modes_by_round(validated(1), tmp_path / "modes.png")
    lines = [line for figure in figures for line in figure.axes[0].get_lines()]
    assert len(lines) == 1 + len(MODES)
    assert all(line.get_marker() not in (None, "None", "") for line in lines)


def test_loss_skips_rounds_without_one(tmp_path, figures) -> None:
    plot_loss(losses(7.0, None, float("nan"), 6.0), tmp_path / "loss.png")
    ((rounds, values),) = drawn_lines(figures[0]).values()
    assert (rounds, values) == ([1, 4], [7.0, 6.0])


def test_a_long_loss_has_a_moving_mean_of_past_rounds(tmp_path, figures) -> None:
    plot_loss(losses(*map(float, range(1, 31))), tmp_path / "loss.png")
    lines = drawn_lines(figures[0])
    rounds, values = lines["mean of the last 3 rounds"]
    assert rounds == list(range(3, 31))
    # The mean of losses n-2, n-1, n is n-1.
    assert values == pytest.approx([n - 1 for n in range(3, 31)])
    assert lines["each round"][1] == list(range(1, 31))


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
        plot_loss(losses(1.0), tmp_path / "plots" / "a.png")


def test_no_global_plotting_state_is_used() -> None:
    source = Path(plots.__file__).read_text()
    assert "import matplotlib.pyplot" not in source
    assert "from matplotlib import pyplot" not in source
    assert "matplotlib.use" not in source
