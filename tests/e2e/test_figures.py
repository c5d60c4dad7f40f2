"""A run's figures in its tables, in its lists and in other tools."""

from pathlib import Path

import ir_measures
import numpy as np
import pytest
import yaml
from ir_measures import RR, Success, nDCG
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pfm_llm.base.errors import ConfigError
from pfm_llm.cli.evaluate import print_ending
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from tests.support.leaks import files_below
from tests.support.scripts import run_script
from tests.support.tiny import Tiny, metrics_of, results_of

MEASURES = {"ndcg": nDCG, "hit_rate": Success, "mrr": RR}


@pytest.fixture(scope="module")
def validated(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is measured on validation alone, at 5 and at 20, with intervals of 50 %."""
    return run_experiment(
        tiny.config(
            tmp_path_factory.mktemp("validated"),
            data__split="last_fraction",
            data__held_out=0.4,
            evaluation__every=1,
            evaluation__ks=[5, 20],
            evaluation__confidence=0.5,
            evaluation__splits=["validation"],
        )
    )


def test_tables_and_sentences_show_what_the_config_measures(
    validated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_ending(validated)
    for text in (capsys.readouterr().out, (validated / "results.md").read_text()):
        assert "Validation split" in text
        assert "NDCG@5 [50 %]" in text
        assert "NDCG@20 [50 %]" in text
        assert "No results" not in text
        assert "@10" not in text
        assert "95 %" not in text
    first, *_ = metrics_of(validated)
    assert set(first["validation"]["shared_only"]) == {"ndcg@5", "hit_rate@5", "next_item_loss"}
    differences = [*results_of(validated)["gains"], *results_of(validated)["comparisons"]]
    assert {row["k"] for row in differences if "ndcg" in row["metric"]} == {5}
    assert (validated / "plots" / "ndcg_by_round.png").is_file()


def test_ir_measures_finds_every_figure_of_a_run_in_its_lists(
    validated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(files_below(validated))
    assert run_script("evaluate.py", "--run", validated, "--ranked", capsys=capsys).code == 0
    assert (
        set(files_below(validated)) == before
    )  # a list is somebody's, and is not in the public folder
    folder = validated.with_name(f"{validated.name}.private") / "ranked" / "validation"
    assert folder.stat().st_mode & 0o777 == 0o700
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels.txt")))
    rows = [
        row
        for row in results_of(validated)["rows"]
        if row["candidates"] == "full" and row["metric"] in MEASURES
    ]
    assert len({(row["method"], row["mode"]) for row in rows}) == 7
    for row in rows:
        name = row["method"] if row["mode"] == "none" else row["mode"]
        run = list(ir_measures.read_trec_run(str(folder / f"{name}.txt")))
        own: dict[str, list[float]] = {}
        for one in ir_measures.iter_calc([MEASURES[row["metric"]] @ row["k"]], qrels, run):
            own.setdefault(one.query_id.partition("#")[0], []).append(one.value)
        assert len(own) == row["num_users"]
        value = np.mean([np.mean(values) for values in own.values()])
        assert value == pytest.approx(row["value"], abs=1e-6)


def test_lists_go_to_the_folder_that_is_asked_for_but_never_to_the_public_one(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="a ranked list is somebody's"):
        evaluate_run(validated, ranked=validated / "lists")
    arguments = ("--run", validated, "--ranked-to", tmp_path)
    found = run_script("evaluate.py", *arguments, capsys=capsys)
    assert found.code == 0
    assert f"for you alone: {tmp_path}" in found.out
    assert (tmp_path / "validation" / "shared_private.parquet").is_file()


def test_trackers_get_the_config_the_validations_and_the_results(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = run_experiment(
        tiny.config(
            tmp_path,
            federation__num_rounds=2,
            evaluation__every=1,
            evaluation__baselines=["popularity"],
            runtime__trackers=["tensorboard"],
        )
    )
    events = EventAccumulator(str(run)).Reload()
    scalars = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    assert set(scalars["loss"]) == {1, 2}
    first, _ = metrics_of(run)
    for mode, figures in first["validation"].items():
        name = f"validation.{mode}.ndcg_at_10"
        assert scalars[name] == {1: pytest.approx(figures["ndcg@10"])}
    results = results_of(run)
    for row in [*results["rows"], *results["gains"], *results["comparisons"]]:
        label = ResultRow(**row).label.replace("@", "_at_")
        assert scalars[f"results.{label}"] == {2: pytest.approx(row["value"], abs=1e-6)}
    assert scalars["costs.rounds"] == {2: 2}
    (settings,) = run.glob("*/hparams.yml")
    kept = yaml.safe_load(settings.read_text())
    assert kept["federation.num_rounds"] == 2
    assert kept["evaluation.ks"] == "[5, 10]"
    assert kept["data.columns.rating"] == "auto"
    assert kept["data.max_users"] is None
