"""The parts of benchmarks/likelihood.py that decide a figure."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.likelihood import count_shots
from benchmarks.likelihood_bench import SEEDS, SETTINGS, Bench, with_settings
from benchmarks.likelihood_lists import _with_lists
from pfm_llm.config.schema import load_config, parse_config
from pfm_llm.config.shipped import find_config
from pfm_llm.data.splits import split_interactions
from pfm_llm.evaluation import scoring
from pfm_llm.likelihood.questions import QuestionSettings
from tests.unit.data.split_cases import FRACTION, make

SCORES = np.array([[0.5, 3.0, -1.0, 2.0, 1.0, 9.0]])
HISTORY = [np.array([5])]


def ranks(weight: float) -> list[int]:
    """The ranks of items 0 to 4 where the first three of a list get new places."""
    lists = [scoring.top_items(SCORES[0], HISTORY[0], 3)]
    assert lists[0][0].tolist() == [1, 3, 4]
    mixed = _with_lists(SCORES, lists, [np.array([-2.0, 0.0, 4.0])], weight)
    found: list[int] = scoring.full_ranks(mixed, HISTORY, [np.arange(5)]).tolist()
    return found


def test_weight_0_leaves_every_rank() -> None:
    assert ranks(0.0) == scoring.full_ranks(SCORES, HISTORY, [np.arange(5)]).tolist()


def test_answers_alone_order_the_list_and_nothing_behind_it() -> None:
    assert ranks(1.0) == [4, 3, 5, 2, 1]


def test_settings_of_the_benchmark_are_valid() -> None:
    config = load_config(find_config("ml100k"), list(SETTINGS))
    changed = with_settings(config, {"seed": 3, "adapters.private.enabled": "true"})
    assert (changed.seed, changed.adapters.private.enabled) == (3, True)
    assert changed.data == config.data


def test_each_seed_counts_once_as_a_measurement_of_test_and_the_baselines_once(
    tmp_path: Path,
) -> None:
    data = make([[1, 2, 3, 4, 5, 6, 7], [3, 2, 1, 7, 6, 5]])
    asked: Any = SimpleNamespace(questions=[])
    encoder = SimpleNamespace(settings=QuestionSettings())
    bench = Bench(
        config=parse_config({"name": "likes"}),
        data=SimpleNamespace(interactions=data, split=split_interactions(data, FRACTION)),  # type: ignore[arg-type]
        folder=tmp_path,
        task=SimpleNamespace(scorer=SimpleNamespace(encoder=encoder)),  # type: ignore[arg-type]
        validation=asked,
        test=asked,
        costs={},
        openings=tmp_path / "test_openings.json",
    )

    def times() -> list[dict[str, tuple[int, int]]]:
        found = [bench.openings_of(seed)["methods"] for seed in SEEDS]
        return [{name: tuple(own.values()) for name, own in one.items()} for one in found]

    count_shots(bench, {64: {"rate": 1e-3, "rounds": 8}})
    baselines = {"like_rate": (1, 1), "like_ridge": (1, 1)}
    of_seed = {"likelihood": (3, 1)}
    assert times() == [of_seed | baselines, of_seed, of_seed]
    bench.count("likelihood_private", {"shots": 64}, SEEDS[0])
    assert times()[0]["likelihood_private"] == (1, 1)
    count_shots(bench, {64: {"rate": 3e-3, "rounds": 8}})  # another choice is another setting
    assert times()[1] == {"likelihood": (6, 1)}
