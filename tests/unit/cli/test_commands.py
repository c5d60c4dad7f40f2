"""What each command makes of its command line."""

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pfm_llm import __version__
from pfm_llm.audit import audit
from pfm_llm.audit.modes import Protection
from pfm_llm.cli.main import make_app
from pfm_llm.config.schema import ExperimentConfig, load_config
from pfm_llm.config.shipped import find_config
from pfm_llm.runs import experiment, publication

Run = Callable[..., Result]


@pytest.fixture
def pfm() -> Iterator[Run]:
    """Runs a command line in this process."""
    logger = logging.getLogger("pfm_llm")
    level = logger.level
    yield lambda *words: CliRunner().invoke(make_app(), [str(word) for word in words])
    logger.setLevel(level)


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """A folder that looks like a run."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("name: a\n")
    return tmp_path / "a"


class Stop(Exception):
    """Ends a command where its real work would begin; holds what that was given."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Result], tuple[object, ...]]:
    """What training, evaluation or a push would have been called with."""

    def stop(*values: object, **named: object) -> None:
        raise Stop(*values, named)

    monkeypatch.setattr(experiment, "run_experiment", stop)
    monkeypatch.setattr(experiment, "evaluate_run", stop)
    monkeypatch.setattr(publication, "request_of", stop)

    def given(result: Result) -> tuple[object, ...]:
        assert isinstance(result.exception, Stop), result.output
        return result.exception.args

    return given


Stopped = Callable[[Result], tuple[object, ...]]


@pytest.mark.parametrize(
    "overrides",
    [
        ["--set", "seed=3", "data.held_out=0.3", "--resume"],
        ["--resume", "--set", "seed=3", "--set", "data.held_out=0.3"],
        ["--set=seed=3", "data.held_out=0.3", "--resume"],
    ],
)
def test_set_takes_several_and_repeats(pfm: Run, stopped: Stopped, overrides: list[str]) -> None:
    config, named = stopped(pfm("train", "--config", "ml100k", *overrides))
    assert config == load_config(find_config("ml100k"), ["seed=3", "data.held_out=0.3"])
    assert named == {"resume": True, "from_round": None}


def test_train_runs_the_quickstart_when_no_config_is_named(pfm: Run, stopped: Stopped) -> None:
    config, _ = stopped(pfm("train"))
    assert config == load_config(find_config("quickstart"))


def test_a_value_after_another_option_is_no_override(pfm: Run, stopped: Stopped) -> None:
    result = pfm("train", "--set", "seed=3", "--resume", "data.held_out=0.3")
    assert result.exit_code == 2
    assert "data.held_out=0.3" in result.stderr


def test_against_takes_several_files(pfm: Run, stopped: Stopped, a_run: Path) -> None:
    given = stopped(pfm("evaluate", "--run", a_run, "--against", "x.json", "y.json"))
    assert given == (a_run, [Path("x.json"), Path("y.json")], None, {})


def test_ranked_lists_go_to_the_private_folder_or_to_the_one_that_is_named(
    pfm: Run, stopped: Stopped, a_run: Path
) -> None:
    private = a_run.with_name(f"{a_run.name}.private") / "ranked"
    assert stopped(pfm("evaluate", "--run", a_run, "--ranked"))[2] == private
    assert stopped(pfm("evaluate", "--run", a_run, "--ranked-to", "out"))[2] == Path("out")


@pytest.mark.parametrize(
    ("options", "private"), [([], True), (["--private"], True), (["--public"], False)]
)
def test_a_new_repository_is_private_unless_public_is_said(
    pfm: Run, stopped: Stopped, a_run: Path, options: list[str], private: bool
) -> None:
    *_, named = stopped(pfm("push", "--run", a_run, "--repo", "me/films", *options))
    assert isinstance(named, dict)
    assert named["private"] is private


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--from-round", "3"], "error: --from-round goes with --resume"),
        (["train", "--config", "quickstar"], "shipped are deployment, games, groceries"),
        (["train", "--config", "quickstart", "--set", "sead=1"], "did you mean seed?"),
        (["recommend"], "error: give --user, or --history, or --compare"),
        (["recommend", "--user", "1", "--history", "a"], "error: give --user, or --history"),
        (["recommend", "--user", "1", "--adapter", "a"], "error: --adapter needs --history"),
        (["recommend", "--adapter", "a"], "error: --adapter needs --history"),
        (["recommend", "--history", "a", "--compare"], "error: --compare is for users of a run"),
        (["push", "--repo", "a/b", "--private", "--public"], "error: --private and --public"),
        (["agent", "--user", "1", "--adapter", "a"], "error: --user is of a run"),
        (["agent", "--user", "1"], "error: --user needs --folder"),
        (["agent", "talk"], "'talk' is not one of 'page', 'mcp', 'sync'"),
        (["agent", "sync"], "error: pfm agent sync needs --adapter"),
        (["push"], "Missing option '--repo'"),
        (["data", "check", "x.csv", "--column", "usr=a"], "user, item, timestamp, rating, title"),
        (["data", "check", "/none.csv"], "error: /none.csv does not exist"),
        (["suite", "--suite", "/none.yaml"], "error: cannot read config /none.yaml"),
        (["audit", "x", "--config", "quickstart"], "error: give a run or --config, not both"),
        (["audit", "--set", "seed=1"], "error: --set goes with --config"),
        (["audit", "no-such-run"], "error: no run at no-such-run"),
    ],
)
def test_a_wrong_command_line_is_said_in_a_message(
    pfm: Run, words: list[str], message: str
) -> None:
    result = pfm(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_version(pfm: Run) -> None:
    assert pfm("--version").stdout == f"pfm_llm {__version__}\n"


def test_config_list_says_a_line_of_each(pfm: Run) -> None:
    lines = pfm("config", "list").stdout.splitlines()
    names = ["deployment", "games", "groceries", "ml100k", "quickstart"]
    assert [line.split()[0] for line in lines] == names
    assert lines[3].split(maxsplit=1)[1].startswith("MovieLens-100K")


def test_config_show_resolves_names_and_overrides(pfm: Run) -> None:
    result = pfm("config", "show", "ml100k", "--set", "seed=7")
    assert result.exit_code == 0, result.stderr
    assert "seed: 7" in result.stdout


def test_data_check_ends_with_1_when_training_would_fail(pfm: Run, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    header = "user_id,item_id,timestamp,title"
    path.write_text("\n".join([header, *(f"u,i{n},{n},t{n}" for n in range(4))]))
    good = pfm("data", "check", path)
    assert good.exit_code == 0, good.stderr
    assert "problem" not in good.stdout
    path.write_text(path.read_text() + "\nu,i9,soon,t9")
    bad = pfm("data", "check", path)
    assert bad.exit_code == 1
    assert "problem: " in bad.stdout


def test_the_agent_says_how_to_get_what_its_page_needs(
    pfm: Run, a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = pfm("agent", "--run", a_run)
    assert result.exit_code == 2
    assert "pip install -c constraints-agent.txt 'pfm-llm[agent]'" in result.stderr


def test_the_host_says_how_to_get_what_it_needs(
    pfm: Run, a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = pfm("host", "serve", "--users", tmp_path / "users", "--run", a_run)
    assert result.exit_code == 2
    assert "pfm host needs fastapi and mcp and prometheus_client" in result.stderr
    assert not (tmp_path / "users").exists()


@pytest.mark.parametrize("words", [["list"], ["remove", "a"], ["interactions", "--out", "x"]])
def test_a_mistyped_folder_of_users_is_not_made(pfm: Run, tmp_path: Path, words: list[str]) -> None:
    result = pfm("host", *words, "--users", tmp_path / "typo")
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_users_of_a_host_are_added_listed_and_removed(pfm: Run, tmp_path: Path) -> None:
    users = ["--users", tmp_path / "users"]
    tokens = {pfm("host", "add", name, *users).stdout.strip() for name in ("b", "a\nx")}
    assert {len(token) for token in tokens} == {43}
    assert pfm("host", "list", *users).stdout == "a x\nb\n"
    assert json.loads(pfm("host", "list", *users, "--json").stdout) == ["a\nx", "b"]
    again = pfm("host", "add", "b", *users)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "already" in again.stderr
    nothing = pfm("host", "interactions", *users, "--out", tmp_path / "node.csv")
    assert "no user of this host lets a federation learn" in nothing.stderr
    assert pfm("host", "remove", "b", *users).exit_code == 0
    assert pfm("host", "remove", "b", *users).exit_code == 2
    assert json.loads(pfm("host", "list", *users, "--json").stdout) == ["a\nx"]


def test_audit_prints_what_leaks_and_writes_the_figures(
    pfm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "mode": "clear", "surface": "update", "metric": "membership_auc", "value": 1.0,
        "ci_low": 1.0, "ci_high": 1.0, "chance": 0.5,
    }  # fmt: skip
    asked = []

    def found(config: ExperimentConfig, plan: audit.Plan) -> dict[str, object]:
        asked.append((config, plan))
        return {"rows": [row]}

    monkeypatch.setattr(audit, "audit_config", found)
    out = tmp_path / "audit.json"
    options = ["--users", "9", "--passes", "0", "--norm", "2", "--noise", "4", "--out", out]
    result = pfm("audit", "--config", "quickstart", "--set", "seed=3", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("clear: leaks who is in one message\n")
    assert json.loads(out.read_text()) == {"rows": [row]}
    plan = audit.Plan(users=9, passes=0.0, protection=Protection(2.0, 4.0))
    assert asked == [(load_config(find_config("quickstart"), ["seed=3"]), plan)]
    printed = pfm("audit", "--config", "quickstart", "--json").stdout
    assert json.loads(printed) == {"rows": [row]}
