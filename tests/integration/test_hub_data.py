"""Data sets of the Hub, over HTTP: revisions and commits, streams, and what is not there."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import HfFileSystem, constants

from pfm_llm.base.errors import CheckpointError, DataError
from pfm_llm.config.data import DataConfig
from pfm_llm.data.check import check_data
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.opening import TRAINED_ON_FILE, open_run
from tests.support.hub_double import HubDouble
from tests.support.tiny import Tiny

REPO = "alice/ratings"
README = b"""---
configs:
- config_name: films
  data_files:
  - {split: train, path: films.csv}
  - {split: test, path: more.csv}
- config_name: texts
  data_files: texts.csv
---
"""


def rows(num_items: int) -> bytes:
    """Each of two users meets every item."""
    lines = [f"u{u},i{i},{1_600_000_000 + i}" for i in range(num_items) for u in range(2)]
    return "\n".join(["user_id,item_id,timestamp", *lines, ""]).encode()


def texts(num_items: int) -> bytes:
    return "\n".join(["item_id,title", *(f"i{i},Film {i}" for i in range(num_items)), ""]).encode()


@pytest.fixture
def commit(hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit of a data set of two configurations."""
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": tmp_path / "datasets",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    HfFileSystem.clear_instance_cache()
    files = {"README.md": README, "films.csv": rows(6), "more.csv": rows(4), "texts.csv": texts(9)}
    return hub.put(REPO, files)


def section(**changes: Any) -> DataConfig:
    hub = {"name": REPO, "config": "films", "items": {"name": REPO, "config": "texts"}, **changes}
    return DataConfig.model_validate({"hub": hub, "min_interactions": 1})


def commits(report: LoadReport) -> list[str]:
    """The commits of both tables, as the report names them."""
    return [origin.rpartition(" at commit ")[2] for origin in report.origins]


@pytest.mark.parametrize("streaming", [False, True])
def test_configuration_and_split_are_read_and_the_commit_recorded(
    streaming: bool, commit: str
) -> None:
    interactions, report = load_interactions(section(streaming=streaming), seed=0)
    assert (interactions.num_users, interactions.num_interactions) == (2, 12)
    assert len(interactions.catalogue) == 9
    assert commits(report) == [commit] * 2
    held_out, _ = load_interactions(section(streaming=streaming, split="test"), seed=0)
    assert held_out.num_interactions == 8
    checked = check_data(section(streaming=streaming))
    assert f"read from {REPO} (data.hub) at commit {commit}" in checked.describe()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_branch_that_moved_is_read_anew_and_its_old_commit_can_be_named(
    streaming: bool, hub: HubDouble, commit: str
) -> None:
    before, _ = load_interactions(section(streaming=streaming), seed=0)
    newer = hub.put(REPO, {"films.csv": rows(7)})
    now, report = load_interactions(section(streaming=streaming), seed=0)
    assert now.num_interactions == 14
    assert commits(report) == [newer] * 2
    again, _ = load_interactions(section(streaming=streaming, revision=commit), seed=0)
    assert again.content_hash() == before.content_hash()


def test_a_stream_of_a_known_commit_is_cached(hub: HubDouble, commit: str) -> None:
    load_interactions(section(streaming=True), seed=0)
    num_asked = len(hub.asked("GET", "films.csv"))
    assert num_asked
    load_interactions(section(streaming=True), seed=0)
    assert len(hub.asked("GET", "films.csv")) == num_asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "books"}, r"data\.hub\.config: .* no 'books'; set it to one of: films, texts$"),
        ({"config": None}, r"several configurations; set it to one of: films, texts$"),
        ({"split": "dev"}, r"data\.hub\.split: .* no 'dev'; set it to one of: train, test$"),
        ({"revision": "v9"}, r"data\.hub\.revision: .* no 'v9'; set it to one of: main, old; or"),
        ({"name": "alice/none"}, r"data\.hub\.name: 'alice/none' is no data set .*check the id"),
        (
            {"config": None, "files": "none.csv"},
            r"data\.hub\.files: 'none\.csv': .*check the names of the files",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    changes: dict[str, Any], message: str, hub: HubDouble, commit: str
) -> None:
    hub.put(REPO, {}, branch="old")
    with pytest.raises(DataError, match=message):
        load_interactions(section(**changes), seed=0)


def test_a_gated_data_set_says_how_to_get_in(hub: HubDouble, commit: str) -> None:
    hub.repo(REPO).gated = True
    with pytest.raises(DataError, match=f"'{REPO}' is gated; ask for access .*hf auth login"):
        load_interactions(section(), seed=0)


def test_what_was_read_once_is_there_offline_with_its_commit(
    hub: HubDouble, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = load_interactions(section(), seed=0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    again, report = load_interactions(section(), seed=0)
    assert again.content_hash() == before.content_hash()
    assert commits(report) == [commit] * 2
    with pytest.raises(DataError, match="if there is no network, save the data set"):
        load_interactions(section(name="alice/other"), seed=0)
    again, _ = load_interactions(section(revision=commit), seed=0)
    assert again.content_hash() == before.content_hash()
    with pytest.raises(DataError, match=f"v9 could not be .* cache has commit {commit}"):
        load_interactions(section(revision="v9"), seed=0)
    with pytest.raises(DataError, match=r"the cache has no 'books' of .* one of: films"):
        load_interactions(section(config="books"), seed=0)


def test_another_commit_in_the_cache_is_not_taken_for_the_one_that_was_asked_for(
    hub: HubDouble, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` falls back to any version in its cache when a file cannot be fetched."""
    load_interactions(section(), seed=0)
    newer = hub.put(REPO, {"films.csv": rows(7)})
    build = datasets.load_dataset_builder

    def fallen_back(*arguments: Any, **settings: Any) -> Any:
        return build(*arguments, **{**settings, "revision": commit})

    monkeypatch.setattr(datasets, "load_dataset_builder", fallen_back)
    with pytest.raises(DataError, match=f"{newer} could not be fetched, .* {commit}"):
        load_interactions(section(), seed=0)


def test_a_run_names_the_commit_that_it_was_trained_on_and_opens_again_beside_it(
    hub: HubDouble, commit: str, tiny: Tiny, tmp_path: Path
) -> None:
    trained_on = hub.put(REPO, {"README.md": b"", "all.csv": tiny.interactions.read_bytes()})
    block = {"name": REPO, "files": ["all.csv"]}
    settings = {"data__source": REPO, "data__hub": block, "federation__num_rounds": 1}
    run = run_experiment(tiny.config(tmp_path / "runs", evaluation__baselines=[], **settings))
    told = json.loads((run / TRAINED_ON_FILE).read_text())
    assert told["origins"] == [f"{REPO} (data.hub) at commit {trained_on}"]
    opened, _ = open_run(run)
    rows_before = opened.data.interactions.content_hash()
    lines = tiny.interactions.read_bytes().splitlines(keepends=True)
    newer = hub.put(REPO, {"all.csv": b"".join(lines[:-4])})
    with pytest.raises(CheckpointError, match=f"at commit {trained_on}; name the commit as rev"):
        open_run(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["hub"]["revision"] = trained_on
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    opened, _ = open_run(run)
    assert opened.data.interactions.content_hash() == rows_before

    def resumed(commit: str) -> Path:
        changed = {**settings, "data__hub": {**block, "revision": commit}}
        config = tiny.config(tmp_path / "runs", evaluation__baselines=[], **changed)
        return run_experiment(config, resume=True)

    assert resumed(trained_on) == run
    with pytest.raises(CheckpointError, match="data_hash was"):
        resumed(newer)
