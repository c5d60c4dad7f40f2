"""Results, their tables, the environment."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.evaluation.results import ResultRow, read_results, write_results
from pfm_llm.evaluation.tables import results_table, terminal_table
from pfm_llm.protocol.types import Mode
from pfm_llm.runs import environment as environment_module
from pfm_llm.runs.environment import _git_state, environment
from tests.support.golden import assert_golden


def row(method: str = "pfm", mode: str = "shared_only", value: float = 0.1, **other) -> ResultRow:
    fields = {
        "task": "next_item",
        "protocol": "leave_last_out",
        "budget": "",
        "split": "test",
        "candidates": "full",
        "metric": "ndcg",
        "k": 10,
        "ci_low": value - 0.01,
        "ci_high": value + 0.01,
        "num_users": 943,
        "seed": 0,
    }
    return ResultRow(method=method, mode=mode, value=value, **(fields | other))


def table_lines(text: str) -> list[list[str]]:
    """The cells of each Markdown line that belongs to a table."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


# --- rows and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["value", "ci_low", "ci_high"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_no_result(field: str, bad: float) -> None:
    with pytest.raises(DataError, match="pfm/shared_only ndcg@10"):
        dataclasses.replace(row(), **{field: bad})


def test_an_unknown_mode_is_refused_and_the_valid_ones_named() -> None:
    with pytest.raises(DataError, match="shared_private"):
        row(mode="sharedprivate")


@given(
    st.lists(
        st.builds(
            ResultRow,
            mode=st.sampled_from(list(Mode)),
            value=st.floats(0, 1),
            ci_low=st.floats(0, 1),
            ci_high=st.floats(0, 1),
        ),
        max_size=4,
    )
)
def test_results_read_back_are_the_results_written(tmp_path_factory, rows) -> None:
    path = tmp_path_factory.mktemp("run") / "results.json"
    extra = {"config": {"seed": 0, "name": "é"}, "costs": {"bytes_up": 12}}
    write_results(path, rows, extra)
    assert read_results(path) == (rows, extra)


def test_results_json_holds_rows_as_plain_objects_with_exactly_the_published_keys(tmp_path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [row(mode=Mode.SHARED_PRIVATE)], {"environment": {"seed": 3}})
    content = json.loads(path.read_text())
    assert list(content) == ["rows", "environment"]
    assert ", ".join(content["rows"][0]) == (
        "method, mode, task, protocol, budget, split, candidates, metric, k, "
        "value, ci_low, ci_high, num_users, seed, regime"
    )
    assert content["rows"][0]["mode"] == "shared_private"


@pytest.mark.parametrize(
    "extra", [{"rows": []}, {"costs": {"seconds": float("nan")}}, {"config": {"path": Path("x")}}]
)
def test_extra_that_cannot_be_written_is_refused_and_no_file_is_left(tmp_path, extra) -> None:
    with pytest.raises(DataError, match=r"results\.json"):
        write_results(tmp_path / "results.json", [row()], extra)
    assert list(tmp_path.iterdir()) == []


def test_missing_results_name_the_script_that_makes_them(tmp_path) -> None:
    with pytest.raises(DataError, match=r"pfm evaluate"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "0.1"}, "value is '0.1'"),
        ({"value": True}, "value is True"),
        ({"k": 10.5}, "k is 10.5"),
        ({"mode": "both"}, "unknown mode"),
        ({"surplus": 1}, "expected the keys method, mode"),
    ],
)
def test_a_malformed_row_is_named_by_its_number(tmp_path, change, message) -> None:
    path = tmp_path / "results.json"
    good = dataclasses.asdict(row())
    path.write_text(json.dumps({"rows": [good, good | change]}))
    with pytest.raises(CorruptFileError, match="row 2.*" + message):
        read_results(path)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": {}}', '{"row": []}'])
def test_a_file_that_holds_no_rows_is_corrupt(tmp_path, content) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(CorruptFileError, match=r"results\.json"):
        read_results(path)


def test_whole_numbers_are_read_as_values(tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [dataclasses.asdict(row()) | {"value": 1}]}))
    assert read_results(path)[0][0].value == 1.0


# --- tables -----------------------------------------------------------------------------------

ROWS = [
    row("pfm", "shared_private", 0.09),
    row("pfm", "shared_private", 0.18, metric="hit_rate"),
    row("pfm", "shared_private", 0.07, metric="mrr"),
    row("pfm", "shared_private", 0.40, candidates="sampled99"),
    row("pfm", "shared_private", 0.66, candidates="sampled99", metric="hit_rate"),
    row("pfm", "zero_shot", 0.01),
    row("pfm", "shared_only", 0.085),
    row("popularity", "none", 0.044),
    row("ease", "none", 0.081),
    row("ease", "none", 0.19, metric="hit_rate"),
    row("ease", "none", 0.5, split="validation"),
    row("ease", "none", 0.3, k=20),
    row("like_ridge", "none", 0.69, task="like", metric="auc", k=0, num_users=679),
    row("pfm", "shared_private", 0.71, task="like", metric="auc", k=0, num_users=679),
]


def test_the_whole_table_in_markdown_and_on_a_terminal() -> None:
    """Baselines first, then modes in their order; the best of each column is marked."""
    assert_golden("results_table.txt", f"{results_table(ROWS)}\n```\n{terminal_table(ROWS)}```\n")


def test_a_row_that_no_column_shows_makes_no_line() -> None:
    difference = row("pfm", "shared_private", metric="ndcg_over_ease", budget="another")
    assert results_table([*ROWS, difference]) == results_table(ROWS)


def test_values_that_look_equal_are_both_marked_best() -> None:
    # 0.10001 and 0.10004 are both shown as 0.1000.
    text = results_table([row("ease", "none", 0.10001), row(value=0.10004), row("x", "none", 0.05)])
    assert text.count("**0.1000**") == 2


def test_only_the_asked_split_and_cut_offs_are_shown() -> None:
    assert "0.5000" in results_table(ROWS, split="validation")
    assert "0.5000" not in results_table(ROWS)
    header = table_lines(results_table(ROWS))[0]
    assert [column for column in header if column.startswith("NDCG")] == [
        "NDCG@10 [95 %]",
        "NDCG@10, 99 neg.",
    ]


def test_the_interval_label_follows_the_confidence() -> None:
    assert "NDCG@10 [99.5 %]" in results_table(ROWS, confidence=0.995)
    assert "NDCG@10 [90 %]" in terminal_table(ROWS, confidence=0.9)


def test_rows_of_another_protocol_or_seed_get_a_table_of_their_own() -> None:
    rows = [row(value=0.2), row(value=0.3, seed=1), row(value=0.4, protocol="global_temporal")]
    text = results_table(rows)
    # Each is alone in its table, so each is its best.
    assert [f"**{value}**" in text for value in ("0.2000", "0.3000", "0.4000")] == [True] * 3
    assert text.count("| Method |") == 3
    assert "seed 1" in text
    assert "global_temporal" in text


def test_budgets_that_differ_become_a_column_and_a_common_one_goes_into_the_caption() -> None:
    same = results_table([row(budget="100 rounds"), row("ease", "none", budget="100 rounds")])
    assert table_lines(same)[0][:2] == ["Method", "Mode"]
    assert "100 rounds" in same.splitlines()[0]
    text = results_table([row(budget="100 rounds"), row("ease", "none", budget="central")])
    assert [line[2] for line in table_lines(text)] == ["Budget", "---", "central", "100 rounds"]


def test_caption_names_split_users_and_seed() -> None:
    caption = results_table([row(num_users=940), row(metric="mrr", num_users=943)]).splitlines()[0]
    assert caption.startswith(
        "Test split · next_item · leave_last_out · 940-943 users · seed 0; whole catalogue"
    )
    assert " 1 users" in results_table([row(num_users=1)])


@pytest.mark.parametrize("table", [results_table, terminal_table])
def test_two_results_for_one_cell_are_an_error(table) -> None:
    with pytest.raises(DataError, match="two results for pfm/shared_only, NDCG@10"):
        table([row(), row(value=0.2)])


@pytest.mark.parametrize("table", [results_table, terminal_table])
def test_no_rows_make_a_sentence_not_a_crash(table) -> None:
    assert table([]) == "No results on the test split.\n"
    assert table([row(split="validation")], "test") == "No results on the test split.\n"


@pytest.mark.parametrize("table", [results_table, terminal_table])
def test_what_was_measured_on_validation_alone_is_shown(table) -> None:
    assert table([row(value=0.3, split="validation")]).startswith("Validation split")
    both = table([row(value=0.3, split="validation"), row(value=0.2)])
    assert both.startswith("Test split")
    assert "0.3000" not in both


@pytest.mark.parametrize("table", [results_table, terminal_table])
def test_every_cut_off_has_a_table_where_nothing_was_measured_at_10(table) -> None:
    rows = [row(value=k / 100, k=k, metric=m) for k in (5, 20) for m in ("ndcg", "hit_rate", "mrr")]
    at_5, at_20 = (block for block in table(rows).split("Test split") if block)
    assert "NDCG@5 [95 %]" in at_5
    assert at_5.count("0.0500") >= 3
    assert "NDCG@20 [95 %]" in at_20
    assert at_20.count("0.2000") >= 3
    assert "@20" not in at_5


def test_the_asked_cut_offs_are_shown_in_their_order_and_unmeasured_ones_left_out() -> None:
    rows = [row(value=k / 100, k=k) for k in (5, 10, 20)]
    rows += [row(metric="auc", task="like", k=0)]
    headers = [
        line for line in results_table(rows, ks=(20, 5, 20, 7)).splitlines() if "Mode" in line
    ]
    assert [header.split("|")[3].strip() for header in headers] == [
        "NDCG@20 [95 %]",
        "NDCG@5 [95 %]",
        "Like AUC [95 %]",
    ]


@pytest.mark.parametrize(
    ("ks", "k"), [((5, 10, 20), 10), ((5, 20), 5), ((20, 5), 20), ((1,), 1), ((), 10)]
)
def test_the_headline_is_at_10_or_at_the_first_cut_off(ks, k) -> None:
    assert headline_k(ks) == k


def test_the_demo_s_table_fits_a_terminal_of_100_columns() -> None:
    assert max(map(len, terminal_table(ROWS).splitlines())) <= 100


# --- environment ------------------------------------------------------------------------------


def test_environment_has_versions_and_launch_settings_in_plain_json() -> None:
    found = environment(seed=7, dtype="bfloat16", threads=2, num_processes=1)
    assert json.loads(json.dumps(found)) == found
    assert ", ".join(found["versions"]) == (
        "python, pfm_llm, torch, transformers, peft, accelerate, datasets, evaluate"
    )
    assert all(found["versions"].values())
    given_settings = {key: found[key] for key in ("seed", "dtype", "threads", "num_processes")}
    assert given_settings == {"seed": 7, "dtype": "bfloat16", "threads": 2, "num_processes": 1}
    assert found["device"] == "cpu"


def test_environment_names_neither_host_nor_home() -> None:
    text = json.dumps(environment(seed=0, dtype="float32", threads=1, num_processes=1))
    assert os.uname().nodename not in text
    assert str(Path.home()) + "/" not in text
    assert str(Path(environment_module.__file__).parent) not in text


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout with one committed file, ``code.py``."""
    # Inside a commit hook these variables point to the repository that is being committed to.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "code.py").write_text("x = 1\n")
    plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    for arguments in (("init", "-q"), ("add", "code.py"), (*who, "commit", "-qm", "m")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, env=os.environ | plain)
    return tmp_path


def test_git_state_is_commit_and_whether_tracked_files_changed(checkout) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()
    code = checkout / "code.py"
    (checkout / "untracked.txt").write_text("")
    assert _git_state(code) == {"commit": head, "dirty": False}
    code.write_text("x = 2\n")
    assert _git_state(code) == {"commit": head, "dirty": True}


def test_code_that_the_surrounding_checkout_does_not_track_has_no_commit(checkout) -> None:
    installed = checkout / "site-packages" / "code.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert _git_state(installed) is None


def test_git_state_outside_a_checkout_or_without_git_is_none(
    tmp_path, checkout, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert _git_state(checkout / "code.py") is None


def test_git_variables_of_a_hook_do_not_mislead(checkout, monkeypatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    state = _git_state(checkout / "code.py")
    assert state is not None
    assert state["dirty"] is False
