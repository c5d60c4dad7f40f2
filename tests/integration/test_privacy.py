"""A private run from end to end: what its files and its published folder say."""

import json
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.publish.artefact import CARD_FILE, MANIFEST_FILE
from pfm_llm.publish.manifest import Manifest
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.summary import findings
from tests.support.privacy import count_in_place_of_epsilon
from tests.support.tiny import Tiny, metrics_of, results_of

SETTINGS: dict[str, Any] = {
    "head__item_met": False,
    "federation__cohort_size": 12,
    "federation__stages": [{"clip": {"norm": 0.5}}],
    "federation__privacy": {"noise_multiplier": 1.0, "max_epsilon": 1.0, "delta": 1e-5},
}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four users in twelves: ε, of which a count stands in its place, is 1 after round 2."""
    with pytest.MonkeyPatch.context() as patch:
        count_in_place_of_epsilon(patch)
        return run_experiment(tiny.config(tmp_path_factory.mktemp("private"), **SETTINGS))


def manifest_of(run: Path) -> Manifest:
    folder = run / "shared_adapter"
    return Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes(), "it")


def test_the_budget_ends_the_run_as_a_finished_one_that_says_so(finished: Path) -> None:
    results = results_of(finished)
    assert results["costs"]["rounds"] == 2
    assert (results["privacy"]["epsilon"], results["privacy"]["planned_rounds"]) == (1.0, 4)
    assert any(row["mode"] == "shared_only" for row in results["rows"])
    told = " ".join(findings(results))
    assert "(1, 1e-05)-differentially private for each user; the figures here are not" in told
    assert "The budget of ε, 1, ended the run after 2 of 4 rounds" in told
    assert metrics_of(finished)[-1]["privacy"]["releases"] == 2


def test_manifest_and_card_have_the_guarantee_and_no_figure_of_users(finished: Path) -> None:
    manifest, folder = manifest_of(finished), finished / "shared_adapter"
    assert manifest.privacy is not None
    assert (manifest.privacy.epsilon, manifest.privacy.clip_norm) == (1.0, 0.5)
    assert (manifest.privacy.releases, manifest.privacy.num_clients) == (2, 24)
    assert manifest.metrics == ()
    card = (folder / CARD_FILE).read_text()
    assert "Differential privacy of users" in card
    assert "NDCG" not in card
    assert (finished / "plots").is_dir()
    assert not (folder / "plots").exists()


def test_a_run_that_is_measured_again_says_the_same(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_in_place_of_epsilon(monkeypatch)
    before = manifest_of(finished)
    evaluate_run(finished)
    assert manifest_of(finished).privacy == before.privacy
    assert results_of(finished)["privacy"]["releases"] == 2


def test_nothing_is_exported_when_nobody_knows_what_was_spent(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_in_place_of_epsilon(monkeypatch)
    ledger = finished.with_name(f"{finished.name}.private") / "server" / "privacy.json"
    secret = json.loads(ledger.read_text())["secret"]
    for path in finished.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()
    kept = ledger.read_bytes()
    ledger.unlink()
    try:
        with pytest.raises(ConfigError, match=r"privacy\.json, is missing"):
            evaluate_run(finished)
    finally:
        ledger.write_bytes(kept)


@pytest.mark.parametrize("extra", [{"federation__masks": True}, {"poisson": True}])
def test_masks_and_draws_go_through_a_whole_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    count_in_place_of_epsilon(monkeypatch)
    settings = SETTINGS | {"federation__privacy": {"noise_multiplier": 1.0, "delta": 1e-5}}
    if extra.pop("poisson", False):
        settings["federation__privacy"] = settings["federation__privacy"] | {
            "participation": "poisson"
        }
    run = run_experiment(tiny.config(tmp_path, **settings, **extra))
    privacy = results_of(run)["privacy"]
    assert (privacy["releases"], privacy["budget"]) == (4, None)
    assert manifest_of(run).privacy is not None


def test_epsilon_and_the_library_through_a_whole_run(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra [dp]")
    settings = SETTINGS | {"federation__privacy": {"epsilon": 8.0, "delta": 1e-5}}
    run = run_experiment(tiny.config(tmp_path, **settings))
    privacy = results_of(run)["privacy"]
    assert privacy["releases"] == 4
    assert 7.9 < privacy["epsilon"] <= 8.0
    assert privacy["accountant"].startswith("dp-accounting 0.")
