"""The engine benchmark races two ways to compute the same thing, and reports them as said."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import engine
from benchmarks.contenders import Bench
from benchmarks.sequential_peft import SequentialPeft, relative_difference, stirred
from pfm_llm.base import files
from pfm_llm.base.errors import ConfigError, TrainingError
from pfm_llm.base.processes import Processes
from pfm_llm.config.choices import Task
from pfm_llm.config.model import (
    AdaptersConfig,
    HeadConfig,
    PrivateAdapterConfig,
    SharedAdapterConfig,
)
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.history import History
from pfm_llm.model import head
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.batches import collate
from pfm_llm.model.cohort import CohortModel, Parts
from pfm_llm.model.items.whitening import fit_normaliser
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.objective import Objective
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import PrivatePart, make_private_part
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.text.encoding import Window
from tests.support.tables import config_of, drawn
from tests.support.tiny import Tiny

HIDDEN, ITEMS, LAYERS, ADAPTED = 16, 11, 3, 2
HEAD = HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
ADAPTERS = AdaptersConfig(
    num_layers=ADAPTED,
    shared=SharedAdapterConfig(rank=3, alpha=6),
    private=PrivateAdapterConfig(kind="independent", rank=2, alpha=5, head_rank=2),
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)  # transformers initialises from the global state
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Backbone(LlamaForCausalLM(config), tokenizer=None, name="tiny", weights_hash="-")


def make_window(client: int, ends: list[int], before: int = 0) -> Window:
    generator = np.random.default_rng(client)
    items, met = generator.integers(0, ITEMS, len(ends)), generator.integers(0, ITEMS, before)
    return Window(
        tokens=generator.integers(0, 40, ends[-1] + 1).astype(np.int32),
        item_ends=np.array(ends, dtype=np.int32),
        history=History(np.concatenate([met, items]).astype(np.int32)),
        start=before,
        first_target=1,
    )


def make_part(adapter: DualAdapter) -> PrivatePart:
    sizes = Sizes(HIDDEN, adapter.modules, ITEMS)
    return make_private_part(config_of(HEAD, ADAPTERS), sizes)


def make_tensors(adapter: DualAdapter, client: int) -> dict[str, torch.Tensor]:
    sizes = Sizes(HIDDEN, adapter.modules, ITEMS)
    shared = drawn(parameter_table(config_of(HEAD, ADAPTERS), sizes).values())
    private = make_part(adapter).initial(f"c{client}")
    found = stirred(shared, 0, "shared") | stirred(private, 0, f"c{client}")
    # Of the items, all but the last two have been met.
    met = (torch.arange(ITEMS) < ITEMS - 2).float()
    return {**found, head.ITEM_MET: met}


@pytest.mark.parametrize("unseen_only", [False, True])
@pytest.mark.parametrize("adapted", [1, ADAPTED, LAYERS])
def test_the_reference_computes_what_the_many_clients_pass_computes(
    backbone: Backbone, adapted: int, unseen_only: bool
) -> None:
    adapter = DualAdapter(backbone, ADAPTERS.model_copy(update={"num_layers": adapted}))
    windows = [
        make_window(0, [2, 5, 9]),
        make_window(1, [1, 3, 6, 8], before=3),
        make_window(2, [4, 5, 6, 12]),
    ]
    tensors = [make_tensors(adapter, client) for client in range(3)]
    states = torch.randn(ITEMS, HIDDEN, generator=torch.Generator().manual_seed(1))
    normaliser = fit_normaliser(states)
    texts = normaliser(states)[:, : HEAD.dim]
    trunk, top = backbone.split(adapted)
    hidden = [
        trunk(input_ids=torch.from_numpy(w.tokens).long()[None]).last_hidden_state[0]
        for w in windows
    ]
    model = CohortModel(
        top,
        adapter.top_paths(),
        adapter.scale(),
        normaliser,
        Objective(texts, (Task.NEXT_ITEM,), make_part(adapter), unseen_only),
    )
    leaves = {n: torch.stack([t[n] for t in tensors]).requires_grad_() for n in tensors[0]}
    losses = model.losses(collate([[w] for w in windows], [[h] for h in hidden]), leaves, Parts())
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))

    reference = SequentialPeft(backbone, adapter, normaliser, texts, unseen_only)
    for client, (window, own) in enumerate(zip(windows, tensors, strict=True)):
        loss, found = reference.client_step(window, own)
        assert float(loss) == pytest.approx(float(losses[client].detach()), rel=1e-5)
        assert found.keys() == leaves.keys()
        for name, stacked in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(found[name], stacked[client], rtol=1e-4, atol=1e-6)
            assert found[name].abs().max() > 0, f"{name} of {client} takes no part"


def test_the_reference_carries_nothing_from_one_client_to_the_next(backbone: Backbone) -> None:
    adapter = DualAdapter(backbone, ADAPTERS)
    states = torch.randn(ITEMS, HIDDEN, generator=torch.Generator().manual_seed(1))
    normaliser = fit_normaliser(states)
    texts = normaliser(states)[:, : HEAD.dim]
    reference = SequentialPeft(backbone, adapter, normaliser, texts, unseen_only=True)
    window, own = make_window(0, [2, 5]), make_tensors(adapter, 0)
    before = reference.client_step(window, own)
    reference.client_step(make_window(1, [1, 2, 3]), make_tensors(adapter, 1))
    after = reference.client_step(window, own)
    assert torch.equal(before[0], after[0])
    assert relative_difference(after[1], before[1]) == 0


@pytest.fixture
def tiny_bench_config(tiny: Tiny, tmp_path: Path) -> ExperimentConfig:
    """The bench's own experiment, all settings of the objective included, on a tiny model."""
    return engine.bench_config(
        str(tmp_path / "trunks"),
        data={"source": str(tiny.interactions), "items": str(tiny.items)},
        backbone={"name": str(tiny.model), "dtype": "float32"},
        window={"items": 4, "max_windows": 1, "reading": "tokens"},
        head={"dim": 8, "id_dim": 4, "item_dropout": 0.0},
    )


@pytest.fixture
def tiny_bench(tiny_bench_config: ExperimentConfig, one_process: Processes) -> Bench:
    return Bench.build(tiny_bench_config, 5, one_process)


def test_the_check_before_the_race_passes_on_the_default_objective(tiny_bench: Bench) -> None:
    assert tiny_bench.check() == {
        "loss": pytest.approx(0, abs=1e-5),
        "gradient": pytest.approx(0, abs=1e-4),
    }


def test_the_check_before_the_race_sees_a_reference_without_the_mask(tiny_bench: Bench) -> None:
    parts = tiny_bench.experiment.model
    unmasked = SequentialPeft(
        parts.backbone, parts.adapter, parts.normaliser, parts.model.item_texts, unseen_only=False
    )
    with pytest.raises(TrainingError, match="a race between them would mean nothing"):
        dataclasses.replace(tiny_bench, same_layers=unmasked).check()


def test_the_whole_command_runs_at_a_small_size(
    tiny_bench_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "bench_config", lambda folder, num_layers: tiny_bench_config)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    out = tmp_path / "engine.json"
    engine.run(Namespace(repeats=2, clients=5, num_layers=None, threads=1, out=out))
    written = json.loads(out.read_text())
    cases = ["stacked_cached", "peft_same_layers", "peft_common_recipe"]
    assert [row["case"] for row in written["rows"]] == cases
    assert all(len(row["values"]) == 2 for row in written["rows"])
    assert written["config"]["clients"] == 5
    assert written["config"]["unseen_only"] is True


def test_more_clients_than_have_a_whole_window_are_refused(
    tiny_bench_config: ExperimentConfig, one_process: Processes
) -> None:
    with pytest.raises(ConfigError, match="--clients: 99, but only"):
        Bench.build(tiny_bench_config, 99, one_process)


def test_relative_difference_is_over_all_tensors_together() -> None:
    expected = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}  # norm sqrt(9 + 16) = 5
    found = {"a": torch.tensor([3.0]), "b": torch.tensor([3.0])}  # off by 1
    assert relative_difference(found, expected) == pytest.approx(1 / 5)


def test_race_alternates_and_gives_each_case_its_own_time() -> None:
    order: list[str] = []
    ticks = iter([0.0, 1.0, 1.0, 4.0, 10.0, 12.0, 12.0, 16.0])
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = engine.race(cases, repeats=2, clock=lambda: next(ticks))
    assert order == ["a", "b", "a", "b"]
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}


def test_rows_give_the_slowest_repeat_and_the_median() -> None:
    # 6 clients in 1, 3 and 2 seconds: 6, 2 and 3 client steps a second.
    (row,) = engine.rows({"stacked_cached": [1.0, 3.0, 2.0]}, num_clients=6)
    assert row == {
        "case": "stacked_cached",
        "unit": "client_steps_per_s",
        "min": 2.0,
        "median": 3.0,
        "repeats": 3,
        "values": [6.0, 2.0, 3.0],
    }


def test_ratios_are_taken_within_a_repeat() -> None:
    # 4/1, 6/2, 10/2 = 4, 3, 5; the ratio of the medians would be 6/2 = 3.
    seconds = {"fast": [1.0, 2.0, 2.0], "slow": [4.0, 6.0, 10.0]}
    assert engine.ratios(seconds) == {"fast/slow": {"min": 3.0, "median": 4.0}}


def test_one_repeat_is_its_own_minimum_and_median() -> None:
    (row,) = engine.rows({"a": [0.5]}, num_clients=1)
    assert row["min"] == row["median"] == 2.0


def result() -> dict[str, Any]:
    seconds = {"stacked_cached": [1.0], "peft_same_layers": [4.0], "peft_common_recipe": [12.0]}
    return {"rows": engine.rows(seconds, 8), "ratios": engine.ratios(seconds)}


def test_the_result_is_plain_json_and_its_table_names_every_case(tmp_path: Path) -> None:
    files.write_json(tmp_path / "engine.json", result())
    read = json.loads((tmp_path / "engine.json").read_text())
    assert read == result()
    table = engine.table(read)
    for row in read["rows"]:
        assert row["case"] in table
    assert "12.0 times" in table


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--clients", "0"]])
def test_nothing_to_time_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["engine.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        engine.main()
    assert stopped.value.code == 2
    assert "at least 1" in capsys.readouterr().err
