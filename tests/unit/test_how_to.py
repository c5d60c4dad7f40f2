"""The Python of docs/how-to.md runs, and what it makes does what the page says."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config import cut_offs, private_kinds
from pfm_llm.config.data import ColumnsConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.rows import validate
from pfm_llm.evaluation import metrics
from pfm_llm.protocol.types import Tensors
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.opening import open_run
from tests.support.tiny import Tiny, results_of

PAGE = Path(__file__).parents[2] / "docs" / "how-to.md"


def python_blocks() -> list[str]:
    """The page's blocks of Python, in order."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's blocks define, run one after another in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert len(blocks) >= 9
    names: dict[str, Any] = {"__name__": "how_to"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)  # noqa: S102
    return names


@pytest.fixture
def tilt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's private kind as the file that it would be, with the page's registry line."""
    [line] = re.findall(r'^\+ +("tilt": .*)$', PAGE.read_text(), re.MULTILINE)
    [(kind, spec)] = eval(f"{{{line}}}", vars(private_kinds).copy()).items()  # noqa: S307
    [block] = [block for block in python_blocks() if "class PopularityTilt" in block]
    module = ModuleType(spec.path.partition(":")[0])
    exec(compile(block, PAGE.name, "exec"), module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(private_kinds.PRIVATE_KINDS, kind, spec)
    return module


def tilt_config(tiny: Tiny, folder: Path, **settings: Any) -> ExperimentConfig:
    """The tiny experiment with the page's private kind."""
    return tiny.config(
        folder,
        method="custom",
        adapters__private__kind="tilt",
        federation__local__schedule="joint",
        federation__num_rounds=6,
        **settings,
    )


def test_the_test_of_the_private_kind_passes(made: dict[str, Any]) -> None:
    made["test_a_tilt_is_the_shrunk_mean_of_what_came_before"]()


def test_the_private_kind_trains_and_every_client_keeps_one_number(
    tilt: ModuleType, tiny: Tiny, tmp_path: Path
) -> None:
    """With the page's file and its line of the registry; nothing else of the library changes."""
    folder = run_experiment(tilt_config(tiny, tmp_path))
    run, trained = open_run(folder)
    assert trained.shared.tensors[tilt.SLOPE].abs().item() > 1e-3  # it starts at 0
    sent = run.model.contract.tensors
    assert tilt.SLOPE in sent
    assert tilt.TILT not in sent
    store = PrivateStore(run.folders.private)
    clients = store.client_ids()
    assert set(clients) == set(run.clients.histories.trainable)
    for client in clients:
        kept = store.load_personalised(client)
        assert kept is not None
        assert {name: tuple(value.shape) for name, value in kept.tensors.items()} == {
            tilt.TILT: (1,)
        }
    rows = results_of(folder)["rows"]
    assert {"shared_only", "shared_private"} <= {row["mode"] for row in rows}


def test_the_private_kind_sends_gradients_to_its_basis_alone(
    tilt: ModuleType, tiny: Tiny, tmp_path: Path
) -> None:
    """All else ends with the bits that it has without a private part."""

    def trained(name: str, is_on: bool) -> Tensors:
        config = tilt_config(tiny, tmp_path, name=name, adapters__private__enabled=is_on)
        return open_run(run_experiment(config))[1].shared.tensors

    own, none = trained("own", True), trained("none", False)
    assert own.keys() - none.keys() == {tilt.SLOPE}
    assert [name for name in none if not torch.equal(own[name], none[name])] == []


def test_the_aggregation_draws_in_what_is_extreme(made: dict[str, Any]) -> None:
    """Of 0 to 8 and 1000, a tenth at each end counts as its neighbour: the mean is 4.5."""
    aggregator = made["WinsorisedMean"]()
    for value in [*range(9), 1000]:
        aggregator._take({"head.x": torch.tensor([float(value)])}, 1.0)
    assert aggregator._combine()["head.x"].tolist() == [4.5]


def test_the_stage_refuses_what_is_too_long(made: dict[str, Any]) -> None:
    """3 and 4 have the norm 5, over both tensors; twice as much has 10."""
    stage = made["Refuse"](5.0)
    context = made["StageContext"](seed=0, round_number=1, cohort_size=2, client_id="user-7")
    delta = {"head.a": torch.tensor([3.0]), "head.b": torch.tensor([4.0])}
    assert stage.on_client(delta, context) is delta
    assert stage.on_server(delta, context) == (delta, 5.0)
    assert stage.summary([5.0, 1.0]) == {"largest_norm": 5.0}
    with pytest.raises(made["ContractError"], match="'user-7': its update has norm 10, at most 5"):
        stage.on_server({name: 2 * value for name, value in delta.items()}, context)


def test_the_data_source_reads_a_log_and_counts_what_it_cannot_use(
    made: dict[str, Any], tmp_path: Path
) -> None:
    good = {"user_id": "u", "item_id": "i", "timestamp": 3, "title": "So What"}
    lines = [json.dumps(good), json.dumps({**good, "timestamp": "noon"}), json.dumps({})]
    (tmp_path / "plays.jsonl").write_text("\n".join(lines))
    raw = validate(made["read_plays"](tmp_path / "plays.jsonl"), ColumnsConfig(), 0.9)
    assert raw.catalogue.item_ids == ("i",)
    assert len(raw.users) == 1


def test_the_baseline_prefers_what_is_late_in_histories(made: dict[str, Any]) -> None:
    """Item 0 is met twice, an event before the end: 2 x 0.4 = 0.8 < 1 + 0 of item 1."""
    histories = [np.array([0, 1]), np.array([0, 2])]
    scores = made["Trending"](0.4).fit(histories, 4).score(histories[:1])
    assert scores.tolist() == [[pytest.approx(0.8), 1.0, 1.0, 0.0]]


def test_the_metric_is_its_formula(made: dict[str, Any]) -> None:
    """0.2 at rank 1, 0.2 x 0.8 at rank 2, nothing below the list."""
    ranks = np.array([1, 2, 3])
    assert made["rbp"](ranks, 2).tolist() == [pytest.approx(0.2), pytest.approx(0.16), 0.0]
    assert made["rbp"](ranks[:0], 2).size == 0


def test_a_known_metric_is_measured_and_shown(
    made: dict[str, Any], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(metrics.RANK_METRICS, "rbp", made["rbp"])  # type: ignore[arg-type]
    monkeypatch.setitem(cut_offs.RANK_LABELS, "rbp", "RBP")
    folder = run_experiment(tiny.config(tmp_path, federation__num_rounds=1))
    assert "rbp" in {row["metric"] for row in results_of(folder)["rows"]}
    assert "RBP@10" in (folder / "results.md").read_text()
