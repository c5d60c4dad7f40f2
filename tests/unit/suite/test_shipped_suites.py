"""The shipped suites and the committed results: they still belong together."""

from pathlib import Path

import pytest

from pfm_llm.config.shipped import find_config
from pfm_llm.suite.plan import load_suite, make_plan
from pfm_llm.suite.status import State, status_of

RESULTS = Path(__file__).parents[3] / "results"


@pytest.mark.parametrize(
    "name", ["ml100k", "ml100k_next", "ml100k_new_items", "games", "groceries"]
)
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
    assert {label: s.detail for label, s in found.items() if s.state is not State.DONE} == {}


def test_the_suite_with_one_cut_in_time_differs_from_groceries_by_its_split_alone() -> None:
    def settings(name: str) -> dict[str, object]:
        plan = make_plan(find_config(f"suites/{name}"), "full", ["shared_only-fedsgd"])
        tree = plan.runs[0].points[0].config.model_dump(mode="json")
        return {key: value for key, value in tree.items() if key != "output"}

    timed, usual = settings("groceries_time"), settings("groceries")
    assert timed.pop("data") | {"split": "leave_last_out"} == usual.pop("data")
    assert timed == usual
