"""A run of a server over nodes, without an engine."""

import json
from pathlib import Path

import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.evaluation.results import read_results
from pfm_llm.node.link import LocalLink
from pfm_llm.node.server_run import DIFFERENCES, run_server
from pfm_llm.node.worker import Worker
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.runs.folders import METRICS_FILE, RESULTS_FILE, RunFolders
from tests.support.nodes import NODES, make_site
from tests.support.tiny import Tiny, random_histories, write_interactions

SETTINGS = {
    "method": "pfm",
    "data__source": "/nowhere.csv",
    "federation__cohort_size": 9,
    "federation__num_rounds": 2,
    "evaluation__every": 1,
}


def crowded_link(tiny: Tiny, folder: Path, processes: Processes) -> LocalLink:
    """Three nodes of 24 users, so that none withholds its figures."""
    everybody = list(random_histories(72).items())
    for number, node in enumerate(NODES):
        write_interactions(folder / f"{node}.csv", dict(everybody[number::3]))
    return LocalLink({n: Worker(make_site(tiny, folder, n), processes) for n in NODES})


def test_a_run_over_nodes_leaves_figures_and_an_adapter_and_goes_on_from_its_commit(
    tiny: Tiny, one_process: Processes, tmp_path: Path
) -> None:
    link = crowded_link(tiny, tmp_path, one_process)
    run = run_server(tiny.config(tmp_path / "runs", **SETTINGS), link)
    assert run == tmp_path / "runs" / "tiny"
    [first, second] = MetricsLog(run / METRICS_FILE).read()
    assert first["validation"].keys() == {"shared_only", "shared_private"}
    assert set(first["validation"]["shared_only"]) == {"ndcg@10", "hit_rate@10", "mrr@10"}
    assert "validation" not in second
    rows, extra = read_results(run / RESULTS_FILE)
    modes = {(row.method, row.mode) for row in rows}
    assert modes == {("pfm", "shared_only"), ("pfm", "shared_private"), ("popularity", "none")}
    assert {row.num_users for row in rows} == {72}
    assert extra["environment"]["nodes"] == dict.fromkeys(NODES, 24)
    names = {one["name"] for one in extra[DIFFERENCES]["test"]}
    assert "shared_private-shared_only" in names
    manifest = read_artefact(RunFolders.of(run).shared_adapter).manifest
    assert (manifest.round, manifest.num_items, manifest.parents) == (2, 30, ())
    assert manifest.metrics
    assert str(tmp_path) not in json.dumps(manifest.model_dump(mode="json"))

    again = run_server(tiny.config(tmp_path / "runs", **SETTINGS), link, resume=True)
    assert again == run
    assert read_results(run / RESULTS_FILE)[0] == rows


def test_a_run_without_a_file_of_items_leaves_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "runs", **SETTINGS, data__items=None)
    with pytest.raises(ConfigError, match=r"data\.items is missing"):
        run_server(config, LocalLink({}))
    assert not (tmp_path / "runs").exists()
