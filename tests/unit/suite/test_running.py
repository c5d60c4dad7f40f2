"""A suite trains what is missing, chooses on validation, and loses nothing when it is stopped."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from pfm_llm.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    StorageError,
    TrainingError,
)
from pfm_llm.base.locks import locked
from pfm_llm.config.schema import load_config, parse_config
from pfm_llm.config.settle import settle
from pfm_llm.evaluation import results
from pfm_llm.evaluation.results import read_results
from pfm_llm.suite.status import State, changes, list_text, read_tree, status_of
from tests.support.suite_double import COSTS, GRID, World, row

ALL = [("a-s0-0.1", False), ("a-s0-0.2", False), ("a-s0-0.3", False), ("b-s0", False)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write()


def states(world: World) -> list[State]:
    plan = world.plan()
    return [status_of(plan, run, world.results).state for run in plan.runs]


def detail(world: World, index: int = 0) -> str:
    plan = world.plan()
    return status_of(plan, plan.runs[index], world.results).detail


def test_the_best_on_validation_is_chosen_and_it_alone_is_evaluated_on_test(world: World) -> None:
    assert world.run() == {}
    assert world.started == ALL
    assert world.evaluated == [("a-s0-0.2", "small"), ("b-s0", "small")]
    found = world.result("a-s0")
    # 0.1 - |lr - 0.2| / 10
    values = [(e["value"], e["figure"]) for e in found["grid"]["values"]]
    assert values == [(0.1, pytest.approx(0.09)), (0.2, 0.1), (0.3, pytest.approx(0.09))]
    assert found["grid"]["key"] == "federation.server.lr_lora"
    assert found["grid"]["chosen"] == 0.2
    assert found["config"]["federation"]["server"]["lr_lora"] == 0.2
    hashes = {entry["value"]: entry["training_hash"] for entry in found["grid"]["values"]}
    assert found["training_hash"] == hashes[0.2]
    assert len(set(hashes.values())) == 3
    assert (found["popularity"], found["did_not_learn"]) == (0.05, False)
    assert found["costs"] == COSTS
    assert found["environment"]["cpu"] == "a <CPU>"
    assert (found["suite"], found["budget"], found["run"], found["seed"]) == (
        "films", "small", "a", 0,
    )  # fmt: skip


def test_a_result_holds_the_rows_of_test_and_those_of_validation_once(world: World) -> None:
    world.run()
    rows, _ = read_results(world.result_file("b-s0"))
    keys = [(r.method, r.mode, r.split, r.k, r.candidates) for r in rows]
    assert len(keys) == len(set(keys)) == 7
    assert ("pfm", "shared_private", "test", 10, "full") in keys
    assert ("pfm", "shared_private", "validation", 10, "full") in keys


def test_losing_folders_are_deleted_with_their_private_ones_unless_kept(world: World) -> None:
    world.run(["a"], keep=True)
    assert world.run_folders() == ["a-s0-0.1", "a-s0-0.2", "a-s0-0.3"]
    world.run(["a"])
    assert world.run_folders() == ["a-s0-0.2"]
    private = [path.name for path in world.runs.glob("*.private")]
    assert private == ["a-s0-0.2.private"]
    assert len(world.started) == 3


def test_without_private_adapter_the_shared_mode_chooses(world: World) -> None:
    world.write(set={"output.dir": str(world.folder / "runs"), "method": "shared_only"})
    assert world.run() == {}
    assert world.result("a-s0")["grid"]["chosen"] == 0.2


def test_of_equal_values_the_first_is_chosen(world: World) -> None:
    world.figure = lambda config: 0.07
    world.run(["a"])
    assert world.result("a-s0")["grid"]["chosen"] == 0.1


@pytest.mark.parametrize(("figure", "expected"), [(0.04, True), (0.05, True), (0.0501, False)])
def test_what_does_not_beat_popularity_did_not_learn(
    world: World, figure: float, expected: bool
) -> None:
    world.figure = lambda config: figure
    world.run(["b"])
    assert world.result("b-s0")["did_not_learn"] is expected
    assert ("did not learn" in detail(world, 1)) is expected


def test_a_second_start_does_nothing(world: World) -> None:
    world.run()
    before = {path: path.read_bytes() for path in world.results.rglob("*.json")}
    world.started.clear()
    world.evaluated.clear()
    assert world.run() == {}
    assert (world.started, world.evaluated) == ([], [])
    assert {path: path.read_bytes() for path in world.results.rglob("*.json")} == before


def moments() -> list[str]:
    names = ["a-s0-0.1", "a-s0-0.2", "a-s0-0.3", "b-s0"]
    moments = [moment for name in names for moment in (name, f"{name} ended")]
    return [*moments, "a-s0-0.2 evaluated", "b-s0 evaluated"]


@pytest.mark.parametrize("moment", moments())
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, MemoryError])
def test_stopped_at_any_moment_it_goes_on_and_trains_nothing_twice(
    world: World, moment: str, end: type[BaseException]
) -> None:
    def stop(name: str) -> None:
        if name == moment:
            raise end

    world.before = stop
    with pytest.raises(end):
        world.run()
    begun = list(world.started)
    world.before = lambda name: None
    assert world.run() == {}
    again = world.started[len(begun) :]
    in_flight = None if "evaluated" in moment else moment.removesuffix(" ended")
    resumed = [name for name, was_resumed in again if was_resumed]
    assert resumed == [] if in_flight is None else resumed == [in_flight]
    expected = sorted([*ALL, *([(in_flight, True)] if in_flight else [])])
    assert sorted(world.started) == expected
    assert world.result("a-s0")["grid"]["chosen"] == 0.2
    assert world.run_folders() == ["a-s0-0.2", "b-s0"]


@pytest.mark.parametrize("nth", range(1, 9))
def test_killed_at_any_file_it_goes_on(
    world: World, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of a whole suite: 4 run results, 4 records and 2 results; killed before the nth."""
    import os

    replace, seen = os.replace, 0

    def deadly(source: Any, target: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == nth:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deadly)
        with pytest.raises(KeyboardInterrupt):
            world.run()
    assert world.run() == {}
    assert states(world) == [State.DONE, State.DONE]
    assert world.result("a-s0")["grid"]["chosen"] == 0.2


def test_killed_between_result_and_deletion_the_next_start_deletes(world: World) -> None:
    world.run(["a"], keep=True)  # as if killed before it could delete
    world.run()
    assert world.run_folders() == ["a-s0-0.2", "b-s0"]


def test_a_folder_without_settings_is_no_run_to_resume(world: World) -> None:
    """Killed at its very first file, a run leaves an empty folder, maybe a private one."""
    (world.runs / "b-s0").mkdir(parents=True)
    (world.runs / "b-s0.private").mkdir()
    assert world.run(["b"]) == {}
    assert world.started == [("b-s0", False)]


def test_a_changed_config_is_run_anew_and_says_why(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.run()
    world.started.clear()
    world.write(budgets={"small": {"set": {"federation.num_rounds": 5}}})
    assert states(world) == [State.STALE, State.STALE]
    assert detail(world) == "federation.num_rounds was 3, is 5"
    caplog.clear()
    assert world.run() == {}
    assert world.started == ALL
    assert "a-s0 is run anew: federation.num_rounds was 3, is 5" in caplog.text
    assert world.result("b-s0")["config"]["federation"]["num_rounds"] == 5


def test_a_run_begun_with_other_settings_is_not_resumed(world: World) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run(["b"])
    world.before = lambda name: None
    world.write(budgets={"small": {"set": {"federation.num_rounds": 5}}})
    assert world.run(["b"]) == {}
    assert world.started == [("b-s0", False), ("b-s0", False)]


def test_a_run_of_old_settings_is_not_taken_when_the_settings_come_back(world: World) -> None:
    """Old record, new folder: what is evaluated must be what the record tells of."""
    world.run(["b"])

    def stop(name: str) -> None:
        raise KeyboardInterrupt

    world.write(budgets={"small": {"set": {"federation.num_rounds": 5}}})
    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run(["b"])
    world.before = lambda name: None
    world.write()
    world.result_file("b-s0").unlink()
    world.started.clear()
    assert world.run(["b"]) == {}
    assert world.started == [("b-s0", False)]
    assert "num_rounds: 3" in (world.runs / "b-s0" / "config.yaml").read_text()


@pytest.mark.parametrize("moment", ["b-s0", "b-s0 ended"])
def test_half_a_run_trained_again_for_its_folder_is_not_evaluated(
    world: World, moment: str
) -> None:
    """The chosen folder is gone, training it again is cut off: it must be finished first."""
    world.run(["b"])
    world.result_file("b-s0").unlink()
    import shutil

    shutil.rmtree(world.runs / "b-s0")
    shutil.rmtree(world.runs / "b-s0.private")

    def stop(name: str) -> None:
        if name == moment:
            raise KeyboardInterrupt

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run(["b"])
    world.before = lambda name: None
    assert world.run(["b"]) == {}
    assert world.started == [("b-s0", False), ("b-s0", False), ("b-s0", True)]


def test_a_new_grid_value_is_trained_alone(world: World) -> None:
    world.run(["a"])
    world.started.clear()
    world.write(grids={"lr": GRID | {"values": [0.1, 0.2, 0.3, 0.21]}})
    assert detail(world) == "grid values was [0.1, 0.2, 0.3], is [0.1, 0.2, 0.3, 0.21]"
    world.figure = lambda config: 0.2
    assert world.run(["a"]) == {}
    assert world.started == [("a-s0-0.21", False)]
    assert world.result("a-s0")["grid"]["chosen"] == 0.21
    assert world.run_folders() == ["a-s0-0.21"]


def test_another_selection_chooses_anew_without_training(world: World) -> None:
    world.run(["b"])
    world.started.clear()
    world.write(select={"metric": "ndcg", "k": 5})
    assert states(world)[1] is State.STALE
    assert world.run(["b"]) == {}
    assert world.started == []
    assert world.result("b-s0")["grid"]["values"][0]["figure"] == 0.9


def test_settings_that_training_does_not_depend_on_may_change(world: World) -> None:
    world.run()
    world.write(
        set={
            "output.dir": str(world.folder / "runs"),
            "runtime.threads": 7,
            "evaluation.ks": [3, 10],
        }
    )
    assert states(world) == [State.DONE, State.DONE]


def test_what_is_measured_follows_the_suite_as_it_stands(world: World) -> None:
    """Trained before, evaluated again: by the settings of now."""
    world.run(["b"])
    world.result_file("b-s0").unlink()
    world.write(set={"output.dir": str(world.folder / "runs"), "evaluation.ks": [3, 10]})
    world.started.clear()
    world.run(["b"])
    assert world.started == []
    assert load_config(world.runs / "b-s0" / "config.yaml").evaluation.ks == (3, 10)


def test_a_setting_that_the_config_gained_since_does_not_make_results_stale(world: World) -> None:
    import json

    world.run(["b"])
    for path in (world.result_file("b-s0"), world.runs / "b-s0.json"):
        content = json.loads(path.read_text())
        del content["config"]["head"]["dropout"]
        path.write_text(json.dumps(content | {"training_hash": "of another version"}))
    assert states(world)[1] is State.DONE


def test_settings_that_follow_from_the_clients_are_kept_and_judged_with_their_values(
    world: World,
) -> None:
    """Without num_rounds, 3.4 passes over 40 clients in cohorts of 8 are 17 rounds: 10 in tens."""
    base = {"name": "base", "data": {"source": "interactions.csv"}}
    (world.folder / "base.yaml").write_text(yaml.safe_dump(base))
    world.run(["b"])
    for tree in (world.result("b-s0"), read_tree(world.runs / "b-s0.json")):
        assert tree is not None
        assert tree["config"]["federation"]["num_rounds"] == 10
        assert tree["num_clients"] == 40
    assert load_config(world.runs / "b-s0" / "config.yaml").federation.num_rounds == 10
    world.run(["b"])
    assert world.started == [("b-s0", False)]
    (world.folder / "base.yaml").write_text(
        yaml.safe_dump(base | {"federation": {"passes": 6.0}})  # 30 rounds
    )
    assert "federation.num_rounds was 10, is 30" in detail(world, 1)


def test_a_result_that_lacks_the_number_of_clients_is_judged_by_its_users() -> None:
    """Results of before that number was kept: 3.4 passes over 943 users are 400 rounds."""
    config = parse_config({"name": "x"})
    stored = {
        "config": settle(config, 943).model_dump(mode="json"),
        "environment": {"data": {"num_users": 943}},
    }
    assert changes(stored, config) == []
    stored["environment"] = {"data": {"num_users": 2000}}
    assert changes(stored, config) == ["federation.num_rounds was 400, is 850"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [("pfm", ["adapters.private.taste.read_rank did not exist"]), ("shared_only", [])],
)
def test_a_taste_of_another_make_is_another(method: str, expected: list[str]) -> None:
    config = parse_config({"name": "x", "method": method})
    stored = {"config": config.model_dump(mode="json"), "training_hash": "of another version"}
    assert changes(stored, config) == []
    del stored["config"]["adapters"]["private"]["taste"]["read_rank"]
    assert changes(stored, config) == expected
    assert changes(stored | {"script": ["benchmarks/x.py"]}, config) == []


def test_a_run_begun_with_a_taste_of_another_make_is_not_resumed(world: World) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    world.write(set={"output.dir": str(world.folder / "runs"), "method": "pfm"})
    world.before = stop
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            world.run(["b"])
    path = world.runs / "b-s0" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["adapters"]["private"]["taste"]["read_rank"]
    path.write_text(yaml.safe_dump(config))
    world.before = lambda name: None
    assert world.run(["b"]) == {}
    assert world.started == [("b-s0", False), ("b-s0", True), ("b-s0", False)]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"grid": {}}'])
def test_a_damaged_result_is_made_again_from_what_is_kept(world: World, content: str) -> None:
    world.run(["b"])
    world.result_file("b-s0").write_text(content)
    world.started.clear()
    assert world.run(["b"]) == {}
    assert world.started == []
    assert world.result("b-s0")["grid"]["values"][0]["value"] is None


def test_a_failed_run_is_recorded_and_does_not_stop_the_others(world: World) -> None:
    def fail(name: str) -> None:
        if name == "a-s0-0.2":
            raise DataError("no data at x; put some there")

    world.before = fail
    assert world.run() == {"a-s0": "no data at x; put some there"}
    assert states(world) == [State.FAILED, State.DONE]
    assert detail(world) == "no data at x; put some there"
    assert world.result("a-s0")["rows"] == []
    world.before = lambda name: None
    world.started.clear()
    assert world.run() == {}
    # 0.1 is kept, 0.2 goes on from where it was.
    assert world.started == [("a-s0-0.2", True), ("a-s0-0.3", False)]
    assert states(world) == [State.DONE, State.DONE]


def test_a_value_that_training_breaks_on_loses_and_is_not_tried_again(world: World) -> None:
    def diverge(name: str) -> None:
        if name == "a-s0-0.2":
            raise TrainingError("the loss is not finite")

    world.before = diverge
    assert world.run(["a"]) == {}
    grid = world.result("a-s0")["grid"]
    assert grid["chosen"] == 0.1
    assert [e["failed"] for e in grid["values"]] == [None, "the loss is not finite", None]
    assert grid["values"][1]["figure"] is None
    assert world.run_folders() == ["a-s0-0.1"]
    world.result_file("a-s0").unlink()
    world.run(["a"])
    assert len(world.started) == 3


def test_when_every_value_breaks_the_run_failed(world: World) -> None:
    def diverge(name: str) -> None:
        raise TrainingError("the loss is not finite")

    world.before = diverge
    failures = world.run(["a"])
    assert "training failed with every value: 0.1: the loss is not finite; 0.2" in failures["a-s0"]
    assert states(world)[0] is State.FAILED
    assert world.run_folders() == []
    world.started.clear()
    assert world.run(["a"]) == failures
    assert world.started == []


def test_a_run_that_cannot_be_resumed_here_says_what_to_delete(world: World) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    def refuse(name: str) -> None:
        raise CheckpointError("threads was 2, is 1")

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run(["b"])
    world.before = refuse
    message = world.run(["b"])["b-s0"]
    assert message == f"threads was 2, is 1; or delete {world.runs / 'b-s0'} to train it anew"


def test_a_missing_figure_fails_the_run_before_more_is_trained(world: World) -> None:
    world.write(select={"metric": "auc", "k": 0, "task": "like"})
    (message,) = world.run(["a"]).values()
    assert "expected one row with metric auc, k 0, task like" in message
    assert len(world.started) == 1


def test_a_disk_that_is_full_ends_no_other_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> None:
        raise StorageError(f"no space left while writing {path}")

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_json", full)
        failures = world.run()
    assert list(failures) == ["a-s0", "b-s0"]
    assert world.run() == {}


def test_a_defect_is_not_taken_for_a_failed_run(world: World) -> None:
    def defect(name: str) -> None:
        raise AssertionError

    world.before = defect
    with pytest.raises(AssertionError):
        world.run()
    assert not world.results.exists()


def test_a_run_that_another_process_has_is_left_to_it(world: World) -> None:
    world.runs.mkdir(parents=True)
    with locked(world.runs / "a-s0.lock", "busy"):
        failures = world.run()
    assert failures == {"a-s0": "a-s0 is being run by another process"}
    assert world.started == [("b-s0", False)]
    assert not world.result_file("a-s0").exists()
    assert world.run() == {}


def test_several_processes_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="--num_processes 1"):
        world.run()
    assert world.started == []
    assert not world.runs.exists()
    assert not world.results.exists()


def test_one_line_for_each_experiment_with_count_and_time_left(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """10 s a training, 4 s a final evaluation, which is unknown at first and then counted."""
    caplog.set_level(logging.INFO, "pfm_llm.suite.running")
    world.run()
    lines = [text for text in caplog.messages if text.startswith("[")]
    assert lines == [
        "[1/4] a-s0-0.1: ndcg@10 0.0900 on validation; 00:10 elapsed, about 00:30 left",
        "[2/4] a-s0-0.2: ndcg@10 0.1000 on validation; 00:20 elapsed, about 00:20 left",
        "[3/4] a-s0-0.3: ndcg@10 0.0900 on validation; 00:30 elapsed, about 00:10 left",
        # Nothing left to train; the second final evaluation is.
        "[4/4] b-s0: ndcg@10 0.0801 on validation; 00:44 elapsed, about 00:04 left",
    ]


def test_time_left_is_known_from_what_was_done_before(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        if name == "a-s0-0.3":
            raise DataError("x")

    world.before = fail
    world.run(["a"])
    world.before = lambda name: None
    caplog.clear()
    caplog.set_level(logging.INFO, "pfm_llm.suite.running")
    world.run()
    lines = [text for text in caplog.messages if text.startswith("[")]
    # It was resumed, so its own 10 s say nothing; two records of 10 s do. One training is left.
    assert lines[0].startswith("[3/4] a-s0-0.3")
    assert lines[0].endswith("00:10 elapsed, about 00:10 left")


def test_a_run_that_failed_is_no_longer_waited_for(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        if name == "a-s0-0.1":
            raise DataError("x")

    world.before = fail
    caplog.set_level(logging.INFO, "pfm_llm.suite.running")
    world.run()
    (line,) = [text for text in caplog.messages if text.startswith("[")]
    assert line == "[4/4] b-s0: ndcg@10 0.0801 on validation; 00:10 elapsed, about 00:00 left"


def test_the_list_says_how_far_each_run_is(world: World) -> None:
    assert list_text(world.plan(), world.results).splitlines() == [
        "a-s0  missing  3 to train",
        "b-s0  missing  1 to train",
        "films, budget small: 2 missing",
    ]

    def stop(name: str) -> None:
        if name == "a-s0-0.3":
            raise KeyboardInterrupt

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.before = lambda name: None
    world.run(["b"])
    assert list_text(world.plan(), world.results).splitlines() == [
        "a-s0  begun    2 of 3 trained",
        "b-s0  done     ndcg@10 0.0801 on validation",
        "films, budget small: 1 done, 1 begun",
    ]
    world.run()
    assert "a-s0  done     federation.server.lr_lora 0.2, ndcg@10 0.1000" in list_text(
        world.plan(), world.results
    )


def test_a_run_is_compared_with_the_chosen_value_of_the_run_that_it_is_against(
    world: World,
) -> None:
    world.write(runs=[{"name": "a", "grid": "lr"}, {"name": "b", "against": "a"}])
    compared = []

    def compare(whole: Path, without: Path, config: Any, budget: str) -> list[results.ResultRow]:
        compared.append((whole.name, without.name, config.name, budget))
        return [row(metric="adds_ndcg", value=0.01, split="test")]

    assert world.run(compare=compare) == {}
    assert compared == [("a-s0-0.2", "b-s0", "b-s0", "small")]
    found, _ = read_results(world.result_file("b-s0"))
    assert [one.value for one in found if one.metric == "adds_ndcg"] == [0.01]


def test_a_run_beside_another_is_compared_the_other_way_round(world: World) -> None:
    world.write(runs=[{"name": "a"}, {"name": "b", "beside": "a"}])
    compared = []

    def compare(one: Path, other: Path, *rest: Any) -> list[results.ResultRow]:
        compared.append((one.name, other.name, rest[-1]))
        return [row(metric="beside_ndcg", value=-0.01, split="test")]

    assert world.run(compare=compare) == {}
    assert compared == [("b-s0", "a-s0", "beside")]


@pytest.mark.parametrize("key", ["against", "beside"])
def test_a_run_is_not_planned_without_the_one_that_it_is_compared_with(
    world: World, key: str
) -> None:
    world.write(runs=[{"name": "a"}, {"name": "b", key: "a"}])
    with pytest.raises(ConfigError, match=r"run b-s0 is compared with a-s0.* add --only a"):
        world.run(only=["b"], compare=lambda *_: [])
    world.write(runs=[{"name": "a", "seeds": [0]}, {"name": "b", key: "a", "seeds": [0, 1]}])
    with pytest.raises(ConfigError, match="run b-s1 is compared with a-s1"):
        world.run(compare=lambda *_: [])
