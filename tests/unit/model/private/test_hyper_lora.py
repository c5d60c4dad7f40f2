"""A private LoRA that is read off the history: equal in training, in serving and in PEFT."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from pfm_llm.base.errors import BackboneError, ConfigError
from pfm_llm.config.choices import ItemIds, Task
from pfm_llm.config.model import AdaptersConfig, HeadConfig
from pfm_llm.data.history import History
from pfm_llm.model.batches import ChunkBatch, collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.layers import SecondRun
from pfm_llm.model.outputs import SharedView
from pfm_llm.model.private.hyper_lora import LORA, OUTPUT, OUTPUT_OWN, by_token
from pfm_llm.model.private.taste import READ_IN, UserEmbedding, read_vectors, vector_name
from pfm_llm.protocol.types import Tensors
from pfm_llm.text.encoding import Window
from tests.support.peft_reference import PeftReference
from tests.support.tables import config_of
from tests.support.tiny_models import (
    ARCHITECTURES,
    CLIENT_WINDOWS,
    TinyCohort,
    make_cohort,
    random_window,
    stack,
    stirred,
)

HEAD = HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
WINDOWS = (CLIENT_WINDOWS[0], CLIENT_WINDOWS[1][1:2], CLIENT_WINDOWS[2][:1])
"""Three clients, each with one window of its own history."""
PRIVATE = {"kind": "hyper_lora", "rank": 3, "alpha": 6, "taste": {"read_rank": 8}}


def _cohort(architecture: str = "llama", kind: str = "hyper_lora") -> TinyCohort:
    return make_cohort(architecture, HEAD, private={**PRIVATE, "kind": kind})


def _tensors(cohort: TinyCohort, seed: int) -> dict[str, torch.Tensor]:
    """Shared and private tensors of a client, all away from zero."""
    shared = {p.name: p.initial() for p in cohort.private.shared_parameters()}
    return cohort.client_tensors(seed) | stirred(shared, seed)


def _without_scores(tensors: Tensors) -> None:
    for name in (vector_name(Task.NEXT_ITEM), OUTPUT_OWN):
        tensors[name].zero_()


def _shared(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n: v for n, v in tensors.items() if not n.startswith("private.")}


def _batch(cohort: TinyCohort, windows: list[list[Window]], last_only: bool = False) -> ChunkBatch:
    return collate(windows, [[cohort.trunk_states(w) for w in own] for own in windows], last_only)


def _views(
    cohort: TinyCohort, batch: ChunkBatch, stacked: Tensors, monkeypatch: pytest.MonkeyPatch
) -> list[SharedView]:
    """What the private part is shown in a training step, per client."""
    found: list[SharedView] = []

    def recorded(view: SharedView) -> None:
        found.append(view)

    monkeypatch.setattr(cohort.private, "past_scores", recorded)
    cohort.model.losses(batch, stacked, Parts())
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_moves_each_position_as_serving_with_its_coefficients_does(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the last layer for all positions equals a whole pass for each position."""
    cohort = _cohort(architecture)
    windows = [list(own) for own in WINDOWS]
    clients = [_tensors(cohort, seed) for seed in (1, 2, 3)]
    batch = _batch(cohort, windows)
    stacked = stack([_shared(tensors) for tensors in clients])
    compared = 0
    for c, view in enumerate(_views(cohort, batch, stacked, monkeypatch)):
        moved, past = view.outputs.moved, cohort.private.past_lora(view)
        assert moved is not None
        counts = torch.tensor([int((w.targets >= 0).sum()) for w in windows[c]]).tolist()
        row = 0
        for window, count in zip(windows[c], counts, strict=True):
            for t in range(count):
                own = {
                    f"private.hyper_lora.{m}": v[row].detach() for m, v in past.coefficients.items()
                }
                own[vector_name(Task.NEXT_ITEM)] = torch.zeros(8)
                served = stack([_shared(clients[c]) | own])
                # A window of the items up to this position, the last of which is read out.
                cut = _cut(window, t + 1)
                asked = _batch(cohort, [[cut]], last_only=True)
                with_lora, without = (
                    cohort.model.user_vectors(asked, served, Parts(private_weight=w))[0][0]
                    for w in (1.0, 0.0)
                )
                difference = with_lora - without
                assert float(difference.abs().max()) > 1e-3
                torch.testing.assert_close(moved[row].detach(), difference, atol=2e-5, rtol=1e-4)
                row, compared = row + 1, compared + 1
    assert compared == sum(batch.outputs_per_client)


@pytest.mark.parametrize("item_ids", [ItemIds.BOTH, ItemIds.NONE])
def test_a_training_step_scores_each_position_as_a_user_of_that_past_is_served(
    item_ids: ItemIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LoRA in the layers, that of the scores and the embedding, all together."""
    head = HEAD.model_copy(update={"item_ids": item_ids})
    cohort = make_cohort("llama", head, private=PRIVATE)
    tensors, window = _tensors(cohort, 2), WINDOWS[0][0]
    shared = stack([_shared(tensors)])
    scores_of_past = cohort.private.past_scores
    (view,) = _views(cohort, _batch(cohort, [[window]]), shared, monkeypatch)
    trained = scores_of_past(view)
    if item_ids is ItemIds.NONE:  # that embedding is fitted to blocks of positions, not read
        trained = trained - UserEmbedding.past_scores(cohort.private, view)  # type: ignore[arg-type]
    past = cohort.private.past_lora(view)
    for t, read in enumerate(past.read):
        own = {f"private.hyper_lora.{m}": v[t] for m, v in past.coefficients.items()}
        own |= {OUTPUT_OWN: read, vector_name(Task.NEXT_ITEM): read}
        if item_ids is ItemIds.NONE:
            own[vector_name(Task.NEXT_ITEM)] = torch.zeros(16)
        served = stack([_shared(tensors) | own])
        asked = _batch(cohort, [[_cut(window, t + 1)]], last_only=True)
        both, alone = (
            cohort.model.scores(asked, served, Parts(private_weight=weight))[0]
            for weight in (1.0, 0.0)
        )
        torch.testing.assert_close(trained[t].detach(), both - alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("item_ids", [ItemIds.BOTH, ItemIds.NONE])
def test_the_scores_of_a_private_part_are_a_linear_layer_of_low_rank(item_ids: ItemIds) -> None:
    cohort = make_cohort("llama", HEAD.model_copy(update={"item_ids": item_ids}), private=PRIVATE)
    tensors, texts = _tensors(cohort, 3), cohort.model.item_texts
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for weight in (1.0, 0.3):
        lora = cohort.private.output_lora(tensors, texts, weight)
        assert lora is not None
        a, b, bias = lora
        assert bias is not None
        added = cohort.private.added_scores(tensors, Task.NEXT_ITEM, texts, weight, vectors)
        assert added is not None
        torch.testing.assert_close(added, vectors @ a.T @ b.T + bias)
        assert float((added - bias).abs().max()) > 1e-3


def _cut(window: Window, items: int) -> Window:
    """The first items of a window."""
    ends = window.item_ends[:items]
    return Window(
        tokens=window.tokens[: ends[-1] + 1],
        item_ends=ends,
        history=window.history,
        start=window.start,
        first_target=window.first_target,
    )


def test_a_served_user_is_scored_as_peft_scores_with_both_adapters() -> None:
    cohort = _cohort()
    tensors = _tensors(cohort, 4)
    _without_scores(tensors)  # the reference knows the LoRA in the layers alone
    window = random_window([2, 3, 1], seed=7)
    scores = cohort.model.scores(_batch(cohort, [[window]], True), stack([tensors]), Parts())
    expected = PeftReference(cohort, tensors).scores(window)[-1]
    torch.testing.assert_close(scores[0], expected.detach(), atol=1e-5, rtol=1e-4)
    plain = {n: v for n, v in tensors.items() if not n.startswith("private.hyper_lora")}
    without = PeftReference(cohort, plain).scores(window)[-1]
    assert float((scores[0] - without).abs().max()) > 1e-2


def test_the_exported_lora_is_plain_peft_and_joins_the_shared_one(tmp_path: Path) -> None:
    """Loaded by PEFT alone and concatenated, both score as this library serves the user."""
    cohort = _cohort()
    tensors = _tensors(cohort, 4)
    _without_scores(tensors)
    lora = {m: cohort.private.factors(m, tensors, 1.0) for m in cohort.private.lora(tensors)}
    own = {module: factors for module, factors in lora.items() if factors is not None}
    cohort.adapter.export_shared(tensors, tmp_path / "shared", "tiny")
    cohort.adapter.export_private(own, tmp_path / "private", "tiny")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    model = copy.deepcopy(cohort.backbone.model)
    peft = PeftModel.from_pretrained(model, str(tmp_path / "shared"), adapter_name="shared")
    peft.load_adapter(str(tmp_path / "private"), adapter_name="private")
    peft.add_weighted_adapter(["shared", "private"], [1.0, 1.0], "both", combination_type="cat")
    peft.set_adapter("both")
    reference = PeftReference(cohort, tensors)
    reference._model = peft.eval().get_base_model()
    window = random_window([2, 3, 1], seed=7)
    scores = cohort.model.scores(_batch(cohort, [[window]], True), stack([tensors]), Parts())
    torch.testing.assert_close(scores[0], reference.scores(window)[-1], atol=1e-4, rtol=1e-4)
    peft.set_adapter("shared")
    assert float((scores[0] - reference.scores(window)[-1]).abs().max()) > 1e-2


def test_a_part_without_a_lora_has_none_to_export(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method: pfm,"):
        _cohort(kind="taste").adapter.export_private({}, tmp_path / "private", "tiny")
    assert not (tmp_path / "private").exists()


def test_a_lora_of_zero_is_not_exported(tmp_path: Path) -> None:
    cohort = _cohort()
    own = cohort.private.own_lora(_tensors(cohort, 4), 0.0)
    with pytest.raises(ConfigError, match="weight of 0"):
        cohort.adapter.export_private(own, tmp_path / "private", "tiny")
    assert not (tmp_path / "private").exists()


def test_the_private_loss_leaves_the_shared_part_as_it_is() -> None:
    """Every shared tensor has the gradient that it has without any private part."""
    cohort = _cohort()
    tensors = _shared(_tensors(cohort, 2))
    gradients = {}
    for weight in (0.0, 1.0):
        stacked = stack([tensors])
        losses = cohort.model.losses(
            _batch(cohort, [list(WINDOWS[1])]), stacked, Parts(private_weight=weight)
        )
        found = torch.autograd.grad(
            losses[0], list(stacked.values()), allow_unused=True, materialize_grads=True
        )
        gradients[weight] = dict(zip(stacked, found, strict=True))
    for name, gradient in gradients[1.0].items():
        if name.startswith("basis."):
            assert not gradients[0.0][name].any()
            assert gradient.any(), f"{name} does not learn"
        else:
            assert torch.equal(gradient, gradients[0.0][name]), name


def test_a_client_depends_on_itself_alone() -> None:
    cohort = _cohort()
    clients = [_shared(_tensors(cohort, seed)) for seed in (1, 2, 3)]
    together = cohort.model.losses(
        _batch(cohort, [list(own) for own in WINDOWS]), stack(clients), Parts()
    )
    for c, tensors in enumerate(clients):
        batch = _batch(cohort, [list(WINDOWS[c])])
        (alone,) = cohort.model.losses(batch, stack([tensors]), Parts())
        torch.testing.assert_close(together[c], alone, atol=1e-5, rtol=1e-5)


def test_the_private_loss_is_what_the_private_part_adds_to_the_loss() -> None:
    cohort = _cohort()
    batch = _batch(cohort, [list(own) for own in WINDOWS])
    stacked = stack([_shared(_tensors(cohort, seed)) for seed in (1, 2, 3)])
    whole, shared = (
        torch.stack(cohort.model.losses(batch, stacked, Parts(private_weight=weight)))
        for weight in (1.0, 0.0)
    )
    private = torch.stack(cohort.model.private_losses(batch, stacked)({}))
    torch.testing.assert_close(private, whole - shared, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output", [False, True])
def test_a_change_of_the_coefficients_reaches_its_own_client_alone(output: bool) -> None:
    cohort = _cohort()
    batch = _batch(cohort, [list(own) for own in WINDOWS])
    clients = [_shared(_tensors(cohort, seed)) for seed in (1, 2, 3)]
    losses = cohort.model.private_losses(batch, stack(clients))
    zeros = cohort.private.initial("anybody")
    names = [n for n in cohort.private.coefficients if (n == OUTPUT_OWN) == output]
    changes = {name: torch.zeros(3, *zeros[name].shape) for name in names}
    for change in changes.values():
        change[1, :3] = torch.tensor([0.5, -1.0, 2.0])
    found, before = (torch.stack(losses(given)) for given in (changes, {}))
    assert (found != before).tolist() == [False, True, False]


def test_the_coefficients_are_h_times_the_user_embedding_and_none_without_a_history() -> None:
    cohort = _cohort()
    tensors = _shared(_tensors(cohort, 5))
    (fitted, empty) = (_fit(cohort, tensors, window) for window in (CLIENT_WINDOWS[0], ()))
    vector = fitted[vector_name(Task.NEXT_ITEM)]
    modules = list(cohort.private.lora(stack([tensors])))
    assert len(modules) == 4
    for module in modules:
        h = tensors[f"{LORA}.{module}.coefficients"]
        torch.testing.assert_close(fitted[f"private.hyper_lora.{module}"], h @ vector)
    assert all(not value.any() for value in empty.values())
    assert fitted.keys() == empty.keys() == cohort.private.initial("anybody").keys()
    assert torch.equal(fitted[OUTPUT_OWN], vector)
    assert sum(value.numel() for value in fitted.values()) == 8 + 8 + 4 * 3


def _fit(
    cohort: TinyCohort, tensors: Tensors, windows: tuple[Window, ...]
) -> Mapping[str, torch.Tensor]:
    history = windows[-1].history if windows else CLIENT_WINDOWS[0][0].history[:0]
    fitted = cohort.model.fit_without_text([history], stack([tensors]))
    return {name: value[0] for name, value in fitted.items()}


def test_shared_tensors_are_those_of_a_taste_three_a_module_and_one_of_the_scores() -> None:
    cohort, taste = _cohort(), _cohort(kind="taste")
    names = {p.name for p in cohort.private.shared_parameters()}
    of_taste = {p.name for p in taste.private.shared_parameters()}
    assert READ_IN in of_taste
    assert names - of_taste == {
        f"{LORA}.model.layers.3.{module}.{factor}"
        for module in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        for factor in ("A", "B", "coefficients")
    } | {OUTPUT}
    assert of_taste <= names


def test_text_alone_has_a_lora_too() -> None:
    head = HeadConfig(dim=8, item_ids=ItemIds.NONE, item_bias=False)
    cohort = make_cohort("llama", head, private=PRIVATE)
    tensors = _shared(_tensors(cohort, 6))
    batch = _batch(cohort, [list(WINDOWS[1])])
    stacked = stack([tensors])
    (loss,) = cohort.model.losses(batch, stacked, Parts())
    names = [n for n in stacked if n.startswith(LORA)]
    gradients = torch.autograd.grad(loss, [stacked[n] for n in names])
    assert all(bool(g.any()) for g in gradients)


def test_several_windows_of_one_history_read_the_whole_past(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second window's coefficients follow from the first window's items too."""
    cohort = _cohort()
    items = np.array([3, 1, 4, 2, 5, 0, 6, 7, 8], dtype=np.int32)
    whole = History(items, liked=items % 2 == 1)
    windows = []
    for start in (0, 4):
        one = random_window([2, 1, 2, 1], seed=start)
        windows.append(dataclasses.replace(one, history=whole, start=start, first_target=start + 1))
    tensors = _shared(_tensors(cohort, 8))
    (view,) = _views(cohort, _batch(cohort, [windows]), stack([tensors]), monkeypatch)
    expected = read_vectors(view.own, torch.from_numpy(items).long())
    assert view.outputs.read is not None
    assert view.outputs.known.tolist() == list(range(1, 9))
    torch.testing.assert_close(view.outputs.read, expected[1:9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lora_of_zero_moves_nothing_in_any_type(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = make_cohort("llama", HEAD, dtype, private=PRIVATE)
    tensors = _shared(_tensors(cohort, 1))
    zero = {n: torch.zeros_like(v) if n.endswith(".B") else v for n, v in tensors.items()}
    shared = {n: v for n, v in tensors.items() if n.startswith("lora.")}
    batch = _batch(cohort, [list(WINDOWS[0])])
    (view,) = _views(cohort, batch, stack([{**zero, **shared}]), monkeypatch)
    assert view.outputs.moved is not None
    assert not view.outputs.moved.any()


def test_an_error_between_the_runs_leaves_nothing_for_the_next_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort = _cohort()
    stacked = stack([_shared(_tensors(cohort, 1))])
    batch = _batch(cohort, [list(WINDOWS[0])])
    before = cohort.model.losses(batch, stacked, Parts())[0]
    with monkeypatch.context() as patched:
        patched.setattr(SecondRun, "__call__", _fails)
        with pytest.raises(MemoryError):
            cohort.model.losses(batch, stacked, Parts())
    plain = Parts(private_weight=0.0)
    other = _batch(cohort, [list(WINDOWS[1])])
    assert cohort.model.losses(other, stacked, plain)[0].isfinite()
    torch.testing.assert_close(cohort.model.losses(batch, stacked, Parts())[0], before)


def _fails(_: SecondRun) -> torch.Tensor:
    raise MemoryError


def test_targets_below_the_last_layer_are_refused() -> None:
    """They would learn nothing: the last layer alone runs once more."""
    with pytest.raises(BackboneError, match=r"2\.mlp\.up_proj is in another"):
        make_cohort("llama", HEAD, targets=["2.mlp.up_proj"], private=PRIVATE)


@pytest.mark.parametrize(
    "setting", [{"on_layers": False}, {"dropout": 0.1}, {"kind": "taste", "steps": 1}]
)
def test_a_setting_without_effect_is_refused(setting: dict[str, object]) -> None:
    adapters = AdaptersConfig.model_validate({"private": {**PRIVATE, **setting}})
    with pytest.raises(ValueError, match=r"has no effect with adapters\.private\.kind"):
        config_of(HEAD, adapters)


def test_a_folder_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    cohort = _cohort()
    tensors = _tensors(cohort, 4)
    own = cohort.private.own_lora(tensors, 1.0)
    (tmp_path / "recommender_head.safetensors").touch()
    mode = tmp_path.stat().st_mode
    with pytest.raises(ConfigError, match="recommender_head"):
        cohort.adapter.export_private(own, tmp_path, "tiny")
    assert tmp_path.stat().st_mode == mode
    for _ in range(2):  # an earlier export is replaced
        cohort.adapter.export_private(own, tmp_path / "mine", "tiny")
    assert len(list((tmp_path / "mine").iterdir())) >= 2


def test_targets_that_other_tokens_read_are_no_place_for_it() -> None:
    with pytest.raises(BackboneError, match=r"adapters\.targets"):
        by_token({"model.layers.3.self_attn.k_proj": (4, 4)})
    for name in ("model.q_proj", "model.layers.\u00b2.mlp.x", f"model.layers.{'9' * 5000}.mlp.x"):
        with pytest.raises(BackboneError, match=r"adapters\.targets"):
            by_token({name: (4, 4)})
    both = {f"model.layers.{i}.mlp.up_proj": (4, 8) for i in (2, 3)}
    assert list(by_token(both)) == ["model.layers.3.mlp.up_proj"]
