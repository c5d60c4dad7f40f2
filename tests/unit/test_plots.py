"""Plots: written whole when there is something to draw, nothing otherwise."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from pfm_llm import plots
from pfm_llm.errors import StorageError
from pfm_llm.plots import plot_loss, plot_modes_by_round, plot_user_gain

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
        lambda path: plot_modes_by_round(validated(2), path, metric="mrr@3"),
        lambda path: plot_user_gain(np.array([]), path),
        lambda path: plot_user_gain(np.array([np.nan]), path),
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
    plot_modes_by_round(records, tmp_path / "modes.png", references={"ease": 0.08})
    lines = drawn_lines(figures[0])
    assert set(lines) == {"shared only", "shared + private", "ease"}
    assert lines["shared only"] == ([5, 10], [0.02, 0.03])
    assert lines["shared + private"] == ([10], [0.04])
    assert set(lines["ease"][1]) == {0.08}


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


def test_a_plot_that_cannot_be_written_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "plots").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"a\.png"):
        plot_loss(losses(1.0), tmp_path / "plots" / "a.png")


def test_no_global_plotting_state_is_used() -> None:
    source = Path(plots.__file__).read_text()
    assert "import matplotlib.pyplot" not in source
    assert "from matplotlib import pyplot" not in source
    assert "matplotlib.use" not in source
