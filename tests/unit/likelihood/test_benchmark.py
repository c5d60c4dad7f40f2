"""The parts of benchmarks/likelihood.py that decide a figure."""

import numpy as np

from benchmarks.likelihood_bench import SETTINGS, with_settings
from benchmarks.likelihood_lists import _with_lists
from pfm_llm.config.schema import load_config
from pfm_llm.config.shipped import find_config
from pfm_llm.evaluation import scoring

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
