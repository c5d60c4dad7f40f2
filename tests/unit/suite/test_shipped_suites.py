"""The shipped suites and the committed results: they still belong together."""

from pathlib import Path

import pytest

from pfm_llm.config.shipped import find_config
from pfm_llm.suite.plan import load_suite, make_plan
from pfm_llm.suite.status import State, status_of

RESULTS = Path(__file__).parents[3] / "results"
STALE = {"ml100k-next/full/sasrec-s0"}
"""Run with an earlier taste in its config, which a script's model does not have."""


@pytest.mark.parametrize("name", ["ml100k", "ml100k_next", "games", "groceries"])
def test_committed_results_are_those_of_the_suites_as_they_stand(name: str) -> None:
    path = find_config(f"suites/{name}")
    plans = [make_plan(path, budget) for budget in load_suite(path).budgets]
    found = {
        f"{plan.suite}/{plan.budget}/{run.label}": status_of(plan, run, RESULTS)
        for plan in plans
        for run in plan.runs
        if plan.result(run, RESULTS).exists()
    }
    assert found
    other = {label: s.detail for label, s in found.items() if s.state is not State.DONE}
    assert other.keys() == {label for label in STALE if label in found}, other
