"""A finished run is compared anew where the run that it is compared with is not what it was."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.evaluation import results
from pfm_llm.evaluation.results import read_results
from pfm_llm.suite.status import State, status_of
from tests.support.suite_double import World, popularity, row


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def state_of(world: World, label: str) -> tuple[State, str]:
    plan = world.plan()
    (run,) = (run for run in plan.runs if run.label == label)
    status = status_of(plan, run, world.results)
    return status.state, status.detail


def rewrite(world: World, label: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a result in place, as a run on another machine would."""
    content = world.result(label)
    change(content)
    world.result_file(label).write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["against", "beside"])
def test_a_run_is_compared_anew_where_the_other_run_was_measured_anew(
    world: World, key: str
) -> None:
    world.write(runs=[{"name": "a"}, {"name": "b", key: "a"}])
    differences = iter([0.01, 0.02, 0.03])

    def compare(*_: Any) -> list[results.ResultRow]:
        return [row(metric="adds_ndcg", value=next(differences), split="test")]

    def found() -> list[float]:
        rows, _ = read_results(world.result_file("b-s0"))
        return [one.value for one in rows if one.metric == "adds_ndcg"]

    assert world.run(compare=compare) == {}
    assert world.run(compare=compare) == {}
    assert state_of(world, "b-s0")[0] is State.DONE
    assert found() == [0.01]

    def other_figures(content: dict[str, Any]) -> None:
        for one in content["rows"]:
            if one["split"] == "test" and one["mode"] != "none":
                one["value"] += 1e-9

    rewrite(world, "a-s0", other_figures)
    assert state_of(world, "b-s0") == (
        State.STALE,
        "a-s0, with which it is compared, was measured anew since; run the suite to compare them "
        "anew",
    )
    trained = list(world.started)
    assert world.run(compare=compare) == {}
    assert found() == [0.02]
    assert world.started == trained  # both folders are there, so nothing is trained
    assert state_of(world, "b-s0")[0] is State.DONE


def test_what_does_not_change_the_figures_of_the_other_run_makes_no_comparison_stale(
    world: World,
) -> None:
    world.write(runs=[{"name": "a"}, {"name": "b", "against": "a"}])
    assert world.run(compare=lambda *_: []) == {}

    def other_baseline(content: dict[str, Any]) -> None:
        content["environment"]["cpu"] = "another"
        content["rows"].append(dataclasses.asdict(popularity(split="test", method="ease")))
        content["rows"].append(dataclasses.asdict(row(split="validation", value=0.3)))

    rewrite(world, "a-s0", other_baseline)
    assert state_of(world, "b-s0")[0] is State.DONE
    world.result_file("a-s0").unlink()  # a missing one has a status of its own
    assert state_of(world, "b-s0")[0] is State.DONE


def test_a_result_from_before_comparisons_were_noted_stays(world: World) -> None:
    world.write(runs=[{"name": "a"}, {"name": "b", "against": "a"}])
    assert world.run(compare=lambda *_: []) == {}
    assert "compared" not in world.result("a-s0")
    rewrite(world, "b-s0", lambda content: content.pop("compared"))
    rewrite(world, "a-s0", lambda content: content.update(training_hash="another"))
    assert state_of(world, "b-s0")[0] is State.DONE


def test_a_run_is_compared_anew_where_the_suite_names_another_one(world: World) -> None:
    world.write(runs=[{"name": "a"}, {"name": "c"}, {"name": "b", "against": "a"}])
    assert world.run(compare=lambda *_: []) == {}
    world.write(runs=[{"name": "a"}, {"name": "c"}, {"name": "b", "against": "c"}])
    assert state_of(world, "b-s0") == (State.STALE, "against was a-s0, is c-s0")
