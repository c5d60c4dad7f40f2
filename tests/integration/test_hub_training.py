"""Publishing while a run trains: every so many rounds and at the end, and what a failure costs."""

from pathlib import Path

import pytest

from pfm_llm.base.errors import HubError
from pfm_llm.publish import hub as our_hub
from pfm_llm.publish.versions.chain import verify_chain
from pfm_llm.publish.versions.history import list_versions
from pfm_llm.runs.experiment import run_experiment
from tests.support.hub_double import READ_TOKEN, WRITE_TOKEN, HubDouble
from tests.support.tiny import Tiny, leftovers, results_of

REPO = "alice/films"


def train(tiny: Tiny, output: Path, every: int = 2) -> Path:
    return run_experiment(
        tiny.config(
            output,
            push_to_hub__repo=REPO,
            push_to_hub__every=every,
            push_to_hub__tag="final",
            federation__server__lr_lora=0.02,
        )
    )


def test_hub_gets_committed_rounds_and_the_end(
    hub: HubDouble, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    run = train(tiny, tmp_path)
    versions = list_versions(REPO)
    assert [version.round for version in versions] == [4, 2]
    assert [version.tags for version in versions] == [("final",), ()]
    assert hub.repo(REPO).private
    # Only the last was evaluated.
    last, first = (our_hub.pull(REPO, version.commit).manifest for version in versions)
    assert (len(first.metrics), len(last.metrics) > 0) == (0, True)
    assert [parent.relation for parent in last.parents] == ["previous"]
    assert verify_chain(REPO).is_whole
    assert leftovers(run, run.with_name("tiny.private")) == []
    assert not (run.with_name("tiny.private") / "pushed").exists()


def test_hub_that_is_away_for_a_moment_costs_that_push_alone(
    hub: HubDouble,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.fail_next("POST", "/api/repos/create", 403)
    train(tiny, tmp_path)
    assert "round 2 was not pushed, training goes on" in caplog.text
    assert [version.round for version in list_versions(REPO)] == [4]


def test_hub_that_refuses_at_the_end_leaves_a_complete_run(
    hub: HubDouble, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(HubError, match=r"The run is complete; push it later with .*--repo alice"):
        train(tiny, tmp_path, every=0)
    assert results_of(tmp_path / "tiny")["rows"]
    assert (tmp_path / "tiny" / "shared_adapter" / "pfm_manifest.json").is_file()
