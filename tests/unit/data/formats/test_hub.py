"""Data sets by `datasets`: every setting, streams in bounded memory, and what can be wrong."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets.exceptions import DatasetNotFoundError

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.data import DataConfig
from pfm_llm.config.schema import dump_config, load_config, parse_config, training_hash
from pfm_llm.data import sources
from pfm_llm.data.check import check_data
from pfm_llm.data.formats import hub
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions
from pfm_llm.publish.export import public_config

NUM_USERS, NUM_ITEMS = 60, 6


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(hub, "_BATCH", 7)  # many batches of few rows


@pytest.fixture
def table(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of many users, one after another in turn; each user meets every item."""
    return [
        {"reader": f"u{user}", "item_id": item, "ts": item * 1000 + user, "text": "long" * 50}
        for item in range(NUM_ITEMS)
        for user in range(NUM_USERS)
    ]


@pytest.fixture
def files(table: list[dict[str, Any]], tmp_path: Path) -> dict[str, Path]:
    """The rows in three formats, and items with a title and a maker."""
    paths = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "json", "parquet")}
    with paths["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    paths["json"].write_text("".join(f"{json.dumps(row)}\n" for row in table))
    datasets.Dataset.from_list(table).to_parquet(paths["parquet"])
    items = [{"code": n, "name": f"Item {n}", "maker": "M"} for n in range(NUM_ITEMS)]
    paths["items"] = tmp_path / "items.json"
    paths["items"].write_text("".join(f"{json.dumps(row)}\n" for row in items))
    return paths


def section(files: dict[str, Path], kind: str = "csv", **settings: Any) -> dict[str, Any]:
    items = {"name": "json", "files": str(files["items"])}
    return {
        "hub": {"name": kind, "files": str(files[kind]), "items": items, **settings},
        "columns": {"user": "reader", "items_item": "code"},
        "min_interactions": 1,
    }


def load(tree: dict[str, Any], seed: int = 0) -> tuple[Interactions, LoadReport]:
    return load_interactions(DataConfig.model_validate(tree), seed)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_stream_is_the_same_data(kind: str, files: dict[str, Path]) -> None:
    whole, _ = load(section(files, kind))
    assert (whole.num_users, whole.num_interactions) == (NUM_USERS, NUM_USERS * NUM_ITEMS)
    assert list(whole.catalogue.fields) == ["title", "maker"]
    streamed, report = load(section(files, kind, streaming=True))
    assert streamed.content_hash() == whole.content_hash()
    assert f"{kind} (data.hub): 360 rows were streamed" in report.notes


def test_a_stream_keeps_the_columns_that_are_used(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, list[str]]] = []
    joined = hub._joined

    def watched(kept: Any, head: Any, num_rows: int) -> Any:
        sizes.append((sum(map(len, kept)), kept[0].column_names))
        return joined(kept, head, num_rows)

    monkeypatch.setattr(hub, "_joined", watched)
    load(section(files, streaming=True))
    assert sizes[0] == (NUM_USERS * NUM_ITEMS, ["reader", "item_id", "ts", ""])


def test_a_stream_keeps_the_rows_of_users_that_may_be_drawn(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    of_users = hub._of_users

    def watched(kept: Any, *arguments: Any) -> Any:
        nonlocal most
        most = max(most, sum(map(len, kept)))
        return of_users(kept, *arguments)

    monkeypatch.setattr(hub, "_of_users", watched)
    drawn, report = load({**section(files, streaming=True), "max_users": 3})
    assert drawn.num_users == 3
    # Every user who was drawn has all rows, though they are spread over the whole stream.
    assert drawn.num_interactions == 3 * NUM_ITEMS
    # Four users are kept for each: 12 × 6 rows, and at most as many again, and a batch.
    assert most <= 2 * 12 * NUM_ITEMS + 7
    assert "csv (data.hub): 72 rows are of users that data.max_users may draw" in report.notes
    again, _ = load({**section(files, streaming=True), "max_users": 3})
    assert again.user_ids == drawn.user_ids
    other, _ = load({**section(files, streaming=True), "max_users": 3}, seed=1)
    assert other.user_ids != drawn.user_ids


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_can_be_limited(streaming: bool, files: dict[str, Path]) -> None:
    _, report = load(section(files, streaming=streaming, max_rows=100))
    assert report.num_rows == 100
    assert "csv (data.hub): at most 100 rows are read" in report.notes


@pytest.mark.parametrize("streaming", [True, False])
def test_splits(streaming: bool, files: dict[str, Path], tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("reader,item_id,ts\nann,0,1\nann,1,2\n")
    both = {"old": str(files["csv"]), "new": [str(few)]}
    asked = section(files, streaming=streaming)
    asked["hub"]["files"] = both
    chosen, _ = load({**asked, "hub": {**asked["hub"], "split": "new"}})
    assert chosen.user_ids == ("ann",)
    with pytest.raises(DataError, match=r"splits old, new and no split 'train'; set data\.hub\.sp"):
        load(asked)
    with pytest.raises(
        DataError, match=r"data\.hub\.split: csv has no 'neu'; set it to one of: old, new$"
    ):
        load({**asked, "hub": {**asked["hub"], "split": "neu"}})


def test_other_content_is_read_anew(files: dict[str, Path]) -> None:
    for streaming in (True, False):
        before, _ = load(section(files, streaming=streaming))
        rows = files["csv"].read_text()
        files["csv"].write_text(rows + "ann,0,1,x\n")
        after, _ = load(section(files, streaming=streaming))
        assert after.num_users == before.num_users + 1
        files["csv"].write_text(rows)


def test_columns_that_are_not_there_are_named(files: dict[str, Path]) -> None:
    tree = {**section(files, streaming=True), "columns": {"items_item": "code", "user": "kunde"}}
    with pytest.raises(
        DataError, match=r"csv \(data\.hub\) has no column 'kunde'(.|\n)*reader, item_id, ts"
    ):
        load(tree)


def test_it_can_be_checked(files: dict[str, Path]) -> None:
    checked = check_data(DataConfig.model_validate(section(files, streaming=True)))
    assert checked.report.num_users == NUM_USERS
    block = yaml.safe_load(checked.block())["data"]
    assert block["hub"] == section(files, streaming=True)["hub"]
    assert DataConfig.model_validate(block).hub == checked.config.hub


GATED = "Dataset 'x' is a gated dataset on the Hub. Ask for access"
FAULTS: list[tuple[Exception, str]] = [
    (DatasetNotFoundError(GATED), r"data\.hub\.name: 'some/one'.*ask for access .*hf auth login"),
    (DatasetNotFoundError("Dataset 'x' doesn't exist"), r"data\.hub\.name: .*check the id"),
    (DatasetNotFoundError("Revision 'v9' doesn't exist"),
     r"data\.hub\.revision: some/one has no 'v9'.*a commit$"),
    (ConnectionError("Couldn't reach the Hub"), r"no network, save the data set with save_to_disk"),
    (ValueError("BuilderConfig 'de' not found. Available: ['en']"),
     r"data\.hub\.config: some/one has no 'de'; set it to one of: en$"),
    (ValueError("Config name is missing.\nPlease pick one among the available configs: ['en']"),
     r"data\.hub\.config: some/one has several configurations; set it to one of: en$"),
    (FileNotFoundError("Unable to find 'x.csv'"), r"data\.hub\.files: 'x\.csv'.*of the files"),
    (RuntimeError("scripts are no longer supported"), r"data\.hub\.name: .*no longer supported"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "problem"), FAULTS)
def test_each_fault_names_its_setting(
    error: Exception, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    tree = {"name": "some/one", "config": "de", "revision": "v9", "files": "x.csv"}
    with pytest.raises(DataError, match=problem):
        load({"hub": tree})


def test_a_file_that_is_not_there_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    items = {"name": "csv", "files": str(tmp_path / "none.csv")}
    with pytest.raises(DataError, match=r"data\.hub\.items\.files: .*none\.csv"):
        load(section(files, items=items))


def test_the_commit_is_part_of_the_key_and_of_the_report(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of the Hub has its commit as the hash of its builder."""
    build: Callable[..., Any] = datasets.load_dataset_builder
    commit = "a" * 40

    def at_commit(name: str, *arguments: Any, **settings: Any) -> Any:
        builder = build("csv" if name == "some/one" else name, *arguments, **settings)
        if name == "some/one":
            builder.hash = commit
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", at_commit)
    tree = section(files, name="some/one", streaming=True)
    _, report = load(tree)
    assert f"read from some/one (data.hub) at commit {commit}" in report.notes
    assert report.origins == (f"some/one (data.hub) at commit {commit}",)
    commit = "b" * 40
    calls: list[object] = []
    validate = sources.validate
    monkeypatch.setattr(sources, "validate", lambda *a: calls.append(a) or validate(*a))
    load(tree)
    _, report = load(tree)
    assert len(calls) == 1
    assert report.origins == (f"some/one (data.hub) at commit {commit}",)


def test_the_name_of_the_data_set_is_that_of_the_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    (tmp_path / "a.csv").write_text("")
    path.write_text("name: mine\ndata: {hub: {name: csv, files: {train: [a.csv, b.csv]}}}\n")
    config = load_config(path)
    assert config.data.source == "csv"
    assert config.data.hub is not None
    assert config.data.hub.files == {"train": (str(tmp_path / "a.csv"), "b.csv")}
    path.write_text(dump_config(config))
    assert load_config(path) == config
    public = public_config(config).data
    assert public.hub is not None
    assert public.hub.files == {"train": ("a.csv", "b.csv")}
    short = parse_config({"name": "x", "data": {"hub": "some/one"}})
    assert short.data.hub is not None
    assert short.data.source == short.data.hub.name == "some/one"
    named = parse_config({"name": "x", "data": {"source": "some/one", "hub": {"split": "a"}}})
    assert named.data.hub is not None
    assert (named.data.hub.name, named.data.hub.split) == ("some/one", "a")
    with_split = parse_config({"name": "x", "data": {"hub": {"name": "some/one", "split": "a"}}})
    assert training_hash(short) != training_hash(with_split)
    with pytest.raises(ConfigError, match="source and hub name two data sets"):
        parse_config({"name": "x", "data": {"hub": "some/one", "source": "a.csv"}})


def test_a_builder_without_files_is_refused() -> None:
    """It would read all of the working folder."""
    with pytest.raises(ConfigError, match=r"data\.hub.*csv is no data set .* name them in files"):
        parse_config({"name": "x", "data": {"hub": "csv"}})


def test_settings_hash_alike_whatever_the_commit() -> None:
    """The data have a hash of their own, so a run can go on after its commit was named."""

    def hashed(**table: Any) -> str:
        hub = {"name": "some/one", "items": {"name": "some/texts"}, **table}
        return training_hash(parse_config({"name": "x", "data": {"hub": hub}}))

    assert hashed(revision="abc") == hashed()
    assert hashed(items={"name": "some/texts", "revision": "abc"}) == hashed()
    assert hashed(items={"name": "some/other"}) != hashed()
    assert hashed(split="test") != hashed()
