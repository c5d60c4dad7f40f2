"""A baseline's script is called with a config, a seed and an output, and read like a run."""

import os
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError, TrainingError
from pfm_llm.suite import scripts
from pfm_llm.suite.scripts import call_script
from pfm_llm.suite.status import State, status_of
from tests.support.suite_double import World

GOOD = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--config", "--seed", "--output", "--openings"):
    parser.add_argument(name, required=True)
arguments = parser.parse_args()
print("reading", file=sys.stderr)
config = pathlib.Path(arguments.config).read_text()
pathlib.Path(arguments.output).write_text(json.dumps([config, arguments.seed, arguments.openings]))
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write(runs=[{"name": "sasrec", "script": "sasrec.py"}])


def call(folder: Path, text: str, *arguments: str) -> None:
    script, config = folder / "s.py", folder / "c.yaml"
    script.write_text(text)
    config.write_text("name: x")
    files = {"config": config, "output": folder / "out.json", "openings": Path("o.json")}
    call_script(script, arguments, seed=3, **files)


def test_a_script_gets_config_seed_and_output(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    call(tmp_path, GOOD)
    assert (tmp_path / "out.json").read_text() == '["name: x", "3", "o.json"]'
    assert "s: reading" in caplog.text


def test_a_script_that_fails_says_why_and_its_old_output_does_not_count(tmp_path: Path) -> None:
    text = "import sys\nfor n in range(9):\n    print('line', n, file=sys.stderr)\nsys.exit(3)"
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(TrainingError, match=r"s\.py ended with 3 and said: line 4 / .*line 8$"):
        call(tmp_path, text)
    assert not (tmp_path / "out.json").exists()


def test_a_missing_script_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no script at"):
        call_script(
            tmp_path / "s.py",
            (),
            config=tmp_path,
            seed=0,
            output=tmp_path / "o",
            openings=tmp_path / "t",
        )


def test_a_stopped_suite_leaves_no_script_running(tmp_path: Path, monkeypatch) -> None:
    text = "import os, sys, time\nprint(os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(60)"
    started = []

    def stop(message: str, name: str, line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    monkeypatch.setattr(scripts._log, "info", stop)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, text)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_a_script_leaves_a_result_like_any_run(world: World) -> None:
    assert world.run() == {}
    found = world.result("sasrec-s0")
    assert found["grid"] == {
        "key": None,
        "chosen": None,
        "values": [
            {
                "value": None,
                "figure": 0.12,
                "failed": None,
                "training_hash": found["training_hash"],
            }
        ],
    }
    assert (found["did_not_learn"], found["costs"]) == (False, {"epochs": 3})
    assert {row["method"] for row in found["rows"]} == {"sasrec", "popularity"}
    assert {row["split"] for row in found["rows"]} == {"validation", "test"}
    world.started.clear()
    assert world.run() == {}
    assert world.started == []


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"script": "other.py"}, "script was ['sasrec.py'], is ['other.py']"),
        ({"arguments": ["--grid"]}, "script was ['sasrec.py'], is ['sasrec.py', '--grid']"),
    ],
)
def test_another_script_is_another_run(world: World, changes: dict, detail: str) -> None:
    world.run()
    world.write(runs=[{"name": "sasrec", "script": "sasrec.py", **changes}])
    plan = world.plan()
    status = status_of(plan, plan.runs[0], world.results)
    assert (status.state, status.detail) == (State.STALE, detail)


def test_further_arguments_reach_the_script(world: World, tmp_path: Path) -> None:
    calls: list[tuple[Path, list[str]]] = []

    def note(script: Path, arguments: list[str], **named: Any) -> None:
        calls.append((script, arguments))
        world.script(script, arguments, **named)

    world.write(runs=[{"name": "s", "script": "s.py", "arguments": ["--grid", "-x"]}])
    assert world.run(script=note) == {}
    assert calls == [(Path("s.py"), ["--grid", "-x"])]
    said = r"said: --config .* --seed 3 --output .* --openings o\.json --grid -x$"
    with pytest.raises(TrainingError, match=said):
        call(tmp_path, "import sys\nsys.exit(' '.join(sys.argv[1:]))", "--grid", "-x")


def test_a_script_that_fails_is_a_failed_run_and_is_tried_again(world: World) -> None:
    def fails(*arguments: Any, **named: Any) -> None:
        raise TrainingError("it fell over")

    assert world.run(script=fails) == {"sasrec-s0": "it fell over"}
    assert world.result("sasrec-s0")["failed"] == "it fell over"
    assert world.run() == {}


def test_a_script_without_the_figure_is_a_failed_run(world: World) -> None:
    world.write(
        select={"metric": "auc", "k": 0, "task": "like"},
        runs=[{"name": "sasrec", "script": "sasrec.py"}],
    )
    (message,) = world.run().values()
    assert "sasrec-s0: expected one row with metric auc" in message
