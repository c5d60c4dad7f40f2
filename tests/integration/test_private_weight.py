"""How strongly the private part counts: validation chooses, the choice is kept and served."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pfm_llm.base.errors import CorruptFileError
from pfm_llm.config.schema import dump_config, load_config
from pfm_llm.model.private import taste
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.measuring import evaluation_task, measure, quality_of
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.private_weight import WEIGHT_FILE
from tests.support.tiny import Tiny

WEIGHTS = [0.0, 0.5, 1.5]
SETTINGS = {
    "method": "pfm",
    "evaluation__private_weights": WEIGHTS,
}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # Large rates, so that the weights matter after four rounds.
        patch.setattr(taste, "_RATE", 0.5)
        patch.setattr(taste, "_RATE_ITEMS", 0.5)
        return run_experiment(tiny.config(tmp_path_factory.mktemp("weights"), **SETTINGS))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs" / finished.name


def weight_of(run: Path) -> float:
    _, trained = open_run(run)
    return trained.private_weight


def log_rank_on_validation(run: Path, weight: float) -> float:
    opened, trained = open_run(run)
    weighted = dataclasses.replace(trained, private_weight=weight)
    mode = Mode.SHARED_PRIVATE
    task = evaluation_task(opened, weighted, opened.data.split.validation, [mode])
    return float(quality_of(measure(opened, task), mode).mean())


def test_the_best_weight_on_validation_is_chosen_served_and_exported(finished: Path) -> None:
    kept = json.loads((finished / WEIGHT_FILE).read_text())
    found = {weight: log_rank_on_validation(finished, weight) for weight in WEIGHTS}
    assert kept["weight"] == max(found, key=found.__getitem__)
    for weight in WEIGHTS:
        gain = found[weight] - found[0.0]
        assert kept["gain_log_rank"][str(weight)] == pytest.approx(gain, abs=1e-9)
    assert len(set(found.values())) == len(WEIGHTS)
    exported = load_config(finished / "shared_adapter" / "training_config.yaml")
    assert weight_of(finished) == exported.adapters.private.weight == kept["weight"]
    # The run's own config still says what was asked for.
    assert load_config(finished / "config.yaml").adapters.private.weight == 1.0


def test_a_kept_choice_stands_until_the_round_or_the_choice_is_another(run: Path) -> None:
    kept = json.loads((run / WEIGHT_FILE).read_text())
    (run / WEIGHT_FILE).write_text(json.dumps(kept | {"weight": 0.25}))
    assert weight_of(run) == 0.25
    (run / WEIGHT_FILE).write_text(json.dumps(kept | {"weight": 0.25, "round": 2}))
    assert weight_of(run) == kept["weight"]
    assert json.loads((run / WEIGHT_FILE).read_text()) == kept

    config = load_config(run / "config.yaml")
    fewer = config.evaluation.model_copy(update={"private_weights": (0.0, 0.5)})
    asked = config.model_copy(update={"evaluation": fewer})
    (run / "config.yaml").write_text(dump_config(asked))
    found = kept["gain_log_rank"]
    assert weight_of(run) == (0.5 if found["0.5"] > 0 else 0.0)
    again = json.loads((run / WEIGHT_FILE).read_text())["gain_log_rank"]
    assert again == {weight: found[weight] for weight in ("0.0", "0.5")}


def test_a_damaged_choice_is_refused_by_name(run: Path) -> None:
    for content in ("{", "[]", "{}"):
        (run / WEIGHT_FILE).write_text(content)
        with pytest.raises(CorruptFileError, match=rf"{WEIGHT_FILE}.*delete it"):
            evaluate_run(run)


def test_a_run_that_is_not_told_chooses_and_one_that_is_told_does_not(
    tiny: Tiny, tmp_path: Path
) -> None:
    chosen = run_experiment(tiny.config(tmp_path / "a", method="pfm_embedding"))
    asked = json.loads((chosen / WEIGHT_FILE).read_text())["gain_log_rank"]
    assert [float(weight) for weight in asked] == [0.0, 0.25, 0.5, 0.75, 1.0]
    fixed: dict[str, object] = {"adapters__private__weight": 0.5}
    fully: dict[str, object] = {"evaluation__private_weights": []}
    for number, (settings, weight) in enumerate([(fixed, 0.5), (fully, 1.0)]):
        run = run_experiment(
            tiny.config(tmp_path / f"b{number}", method="pfm_embedding", **settings)
        )
        assert not (run / WEIGHT_FILE).exists()
        assert weight_of(run) == weight
    # A part that takes steps would be trained anew for each weight; and one has none to weigh.
    for method in ("fedrep", "shared_only"):
        other = run_experiment(tiny.config(tmp_path / method, method=method))
        assert not (other / WEIGHT_FILE).exists()
        assert weight_of(other) == 1.0
