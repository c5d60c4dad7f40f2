"""A suite's YAML becomes configs; what is wrong with it is said, with the nearest valid key."""

from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.schema import training_hash
from pfm_llm.suite.plan import load_suite, make_plan
from tests.support.suite_double import GRID, World

SUITES = sorted((Path(__file__).parents[3] / "configs" / "suites").glob("*.yaml"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write()


def test_every_run_seed_and_value_is_one_experiment(world: World) -> None:
    plan = world.plan("full")
    assert [run.label for run in plan.runs] == ["a-s0", "a-s1", "b-s0", "b-s1"]
    first = plan.runs[1]
    assert [point.config.name for point in first.points] == ["a-s1-0.1", "a-s1-0.2", "a-s1-0.3"]
    assert [p.config.federation.server.lr_lora for p in first.points] == [0.1, 0.2, 0.3]
    assert {point.config.seed for point in first.points} == {1}
    assert [point.config.name for point in plan.runs[3].points] == ["b-s1"]
    assert plan.runs[3].key is None
    assert plan.runs[0].points[0].folder == world.folder / "runs" / "films-full" / "a-s0-0.1"
    hashes = {training_hash(point.config) for run in plan.runs for point in run.points}
    assert len(hashes) == 2 * 3 + 2


def test_later_settings_win_base_suite_budget_run_value(world: World) -> None:
    """Each level sets one key more than the level above it leaves alone."""
    keys = ["federation.server.momentum", "head.dim", "head.id_dim", "window.items"]
    levels: list[dict[str, Any]] = [dict.fromkeys(keys[n:], n or 0.1) for n in range(4)]
    levels[0] |= {"head.dim": 9, "head.id_dim": 9, "window.items": 9}
    levels[0] |= {"output.dir": str(world.folder / "runs")}
    world.write(
        set=levels[0],
        budgets={"small": {"set": levels[1]}},
        grids={"items": {"key": "window.items", "values": [7]}},
        runs=[{"name": "a", "set": levels[2], "grid": "items"}],
    )
    config = world.plan().runs[0].points[0].config
    assert config.federation.num_rounds == 3
    assert config.federation.server.momentum == 0.1
    assert (config.head.dim, config.head.id_dim, config.window.items) == (1, 2, 7)


def test_a_run_may_set_more_with_one_budget(world: World) -> None:
    key = "window.items"
    dirs = {"output.dir": str(world.folder / "runs")}
    run = {"name": "a", "set": {key: 5}, "set_with": {"full": {key: 6}}}
    budgets: dict[str, Any] = {"small": {}, "full": {"set": {key: 4}}}
    world.write(set=dirs, budgets=budgets, runs=[run])
    items = [world.plan(b).runs[0].points[0].config.window.items for b in ("small", "full")]
    assert items == [5, 6]


def test_a_run_s_method_overrules_the_base_but_not_the_run(world: World) -> None:
    """Method fedrep fixes schedule: alternate, local_only schedule: joint and a private adapter."""
    key, enabled = "federation.local.schedule", "adapters.private.enabled"
    settings = {"output.dir": str(world.folder / "runs"), key: "joint", enabled: False}
    world.write(
        set=settings,
        runs=[
            {"name": "fedrep", "set": {"method": "fedrep"}},
            {"name": "local", "set": {"method": "local_only"}},
            {"name": "none", "set": {"method": "custom"}},
        ],
    )
    configs = [run.points[0].config for run in world.plan().runs]
    schedules = [config.federation.local.schedule for config in configs]
    assert schedules == ["alternate", "joint", "joint"]
    assert [config.adapters.private.enabled for config in configs] == [True, True, False]
    world.write(runs=[{"name": "a", "set": {"method": "fedrep", key: "joint"}}])
    with pytest.raises(ConfigError, match=r"method fedrep fixes federation.local.schedule"):
        world.plan()
    world.write(runs=[{"name": "a", "set": {"method": "fedpre"}}])
    with pytest.raises(ConfigError, match=r"run a:\n  method: .*'fedrep'"):
        world.plan()


def test_only_validation_is_evaluated_whatever_the_base_says(world: World) -> None:
    base = world.folder / "base.yaml"
    base.write_text(base.read_text() + "evaluation: {splits: [test, validation]}\n")
    for run in world.plan().runs:
        assert run.points[0].config.evaluation.splits == ("validation",)
    world.write(runs=[{"name": "s", "script": "s.py"}])
    (run,) = world.plan().runs
    assert run.points[0].config.evaluation.splits == ("validation", "test")


def test_a_budget_may_leave_runs_out_and_only_may_leave_out_more(world: World) -> None:
    world.write(budgets={"small": {"runs": ["b"]}, "full": {"seeds": [4]}})
    assert [run.label for run in world.plan().runs] == ["b-s0"]
    assert [run.label for run in world.plan("full", ["a"]).runs] == ["a-s4"]
    assert world.plan("full", ["b"]).runs[0].position == 1
    with pytest.raises(ConfigError, match=r"run 'a' is unknown; there is b"):
        world.plan("small", ["a"])
    with pytest.raises(ConfigError, match=r"budget 'huge' is unknown; there is full, small"):
        world.plan("huge")


def test_a_budget_may_do_without_grids(world: World) -> None:
    budgets = {"small": {}, "large": {"grids": False}}
    world.write(budgets=budgets)
    assert [len(run.points) for run in world.plan("small").runs] == [3, 1]
    large = world.plan("large")
    assert [run.key for run in large.runs] == [None, None]
    assert [run.points[0].config.name for run in large.runs] == ["a-s0", "b-s0"]


def test_a_run_may_have_seeds_of_its_own(world: World) -> None:
    world.write(runs=[{"name": "a", "seeds": [3]}, {"name": "b"}])
    assert [run.label for run in world.plan("full").runs] == ["a-s3", "b-s0", "b-s1"]


def test_values_of_any_kind_make_names(world: World) -> None:
    values = ["cosine", 1.0e-5, "a/b c"]
    world.write(
        grids={"lr": {"key": "prompt", "values": values}}, runs=[{"name": "a", "grid": "lr"}]
    )
    with pytest.raises(ConfigError, match="prompt"):
        world.plan()  # a number is no prompt
    world.write(
        grids={"lr": {"key": "prompt", "values": ["cosine", "a/b c"]}},
        runs=[{"name": "a", "grid": "lr"}],
    )
    names = [point.config.name for point in world.plan().runs[0].points]
    assert names == ["a-s0-cosine", "a-s0-a_b_c"]


@pytest.mark.parametrize(
    ("select", "ks", "figure"),
    [
        ({}, [5, 10], "ndcg@10"),
        ({}, [5, 20], "ndcg@5"),
        ({"k": 20}, [5, 20], "ndcg@20"),
        ({"metric": "auc", "task": "like"}, [5, 20], "auc"),
    ],
)
def test_the_choice_is_made_at_a_cut_off_that_is_measured(
    world: World, select: dict[str, Any], ks: list[int], figure: str
) -> None:
    dirs = {"output.dir": str(world.folder / "runs"), "evaluation.ks": ks}
    world.write(select=select, set=dirs)
    assert world.plan().select.figure == figure


def test_a_cut_off_that_a_run_does_not_measure_is_refused_before_training(world: World) -> None:
    dirs = {"output.dir": str(world.folder / "runs"), "evaluation.ks": [5, 20]}
    runs = [{"name": "a"}, {"name": "b", "set": {"evaluation.ks": [20, 30]}}]
    world.write(set=dirs, runs=runs)
    assert world.plan().select.figure == "ndcg@20"
    world.write(set=dirs, runs=runs, select={"k": 5})
    with pytest.raises(ConfigError, match=r"select.k is 5, .* the cut-offs of all runs are 20"):
        world.plan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, r"unknown key grid; did you mean grids\?"),
        (
            {"budgets": {"small": {"seed": [0]}}},
            r"key budgets.small.seed; did you mean .*small.seeds",
        ),
        (
            {"grids": {"lr": GRID | {"vals": []}}},
            r"key grids.lr.vals; did you mean grids.lr.val",
        ),
        (
            {"runs": [{"name": "a", "scrpt": "x"}]},
            r"key runs.0.scrpt; did you mean runs.0.scr",
        ),
        (
            {"select": {"metrics": "ndcg"}},
            r"key select.metrics; did you mean .*metric\?",
        ),
        ({"runs": [{"nam": "a"}]}, r"runs.0.name: Field required"),
        ({"runs": [{"name": "a", "set": {"head.dmi": 2}}]}, r"run a:\n.*did you mean head.dim\?"),
        ({"runs": [{"name": "a", "set_with": {"al": {}}}]}, r"run a: set_with 'al' is unknown"),
        (
            {"runs": [{"name": "a", "set_with": {"full": {"method": "pfm"}}}]},
            r"method belongs to set",
        ),
        ({"runs": [{"name": "a", "grid": "x"}]}, r"run a: grid 'x' is unknown; there is lr"),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, r"run 'a' is not unique"),
        ({"runs": [{"name": "a", "grid": "lr"}, {"name": "a-s0"}]}, None),
        ({"runs": [{"name": "a", "grid": "lr"}, {"name": "a-s0-0.1"}]}, None),
        ({"runs": [{"name": "a/b"}]}, r"runs.0.name: "),
        ({"runs": []}, r"runs: "),
        ({"runs": [{"name": "a", "grid": "lr", "script": "x.py"}]}, r"takes no grid"),
        ({"runs": [{"name": "a", "arguments": ["-x"]}]}, r"run a: arguments are for a script"),
        ({"budgets": {"small": {"runs": ["c"]}}}, r"budget small: run 'c' is unknown; there is a"),
        ({"budgets": {"small": {"seeds": []}}}, r"budgets.small.seeds: "),
        ({"grids": {"lr": GRID | {"values": [0.1, 0.1]}}}, r"run folder 'a-s0-0.1' is not unique"),
        ({"set": {"seed": 3}}, r"seed is set by the suite"),
        ({"set": {"evaluation.splits": ["test"]}}, r"evaluation.splits: a suite chooses on"),
        ({"set": {"push_to_hub.repo": "me/films"}}, r"push_to_hub: a suite publishes nothing"),
        ({"set": {"evaluation.baselines": ["ease"]}}, r"evaluation.baselines lacks popularity"),
        ({"base": "nowhere.yaml"}, r"cannot read .*nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said(world: World, changes: dict[str, Any], message: str | None) -> None:
    world.write(**changes)
    if message is None:
        assert world.plan()
        return
    with pytest.raises(ConfigError, match=message):
        world.plan()


def test_two_runs_never_share_a_folder(world: World) -> None:
    """Run a at seed 0 with value s0 would be where run a-s0 is at seed 0."""
    grid = {"key": "prompt", "values": ["s0"]}
    world.write(grids={"p": grid}, runs=[{"name": "a", "grid": "p"}, {"name": "a-s0"}])
    with pytest.raises(ConfigError, match=r"run folder 'a-s0-s0' is not unique"):
        world.plan()


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "name"])
def test_what_is_no_yaml_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"suite\.yaml"):
        load_suite(path)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_of_the_project_are_valid(path: Path) -> None:
    for budget in load_suite(path).budgets:
        assert make_plan(path, budget).runs


def test_there_are_suites() -> None:
    assert SUITES


def test_a_run_is_against_an_earlier_experiment(world: World) -> None:
    world.write(runs=[{"name": "a"}, {"name": "b", "against": "a"}])
    assert [run.against for run in world.plan().runs] == [None, "a"]
    world.write(runs=[{"name": "a"}, {"name": "b", "beside": "a"}])
    assert [run.beside for run in world.plan().runs] == [None, "a"]
    world.write(runs=[{"name": "b", "beside": "a"}, {"name": "a"}])
    with pytest.raises(ConfigError, match=r"run b: beside 'a' is unknown; there is none"):
        world.plan()
    world.write(runs=[{"name": "b", "against": "a"}, {"name": "a"}])
    with pytest.raises(ConfigError, match=r"run b: against 'a' is unknown; there is none"):
        world.plan()
    world.write(runs=[{"name": "a", "script": "s.py"}, {"name": "b", "against": "a"}])
    with pytest.raises(ConfigError, match="a script is no run to compare"):
        world.plan()
