"""Answers in rows equal those of the whole model, one question at a time, with PEFT's adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from pfm_llm.base.errors import BackboneError
from pfm_llm.likelihood.model import LikelihoodModel, collate_questions, head_rows
from pfm_llm.likelihood.questions import QuestionRow, pack
from pfm_llm.model.batches import Dropout
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import Tensors
from tests.support.peft_reference import load_private
from tests.support.tiny_models import TinyCohort, make_backbone, make_cohort, random_backbone, stack

ANSWERS = (11, 23)
HISTORY = [3, 50, 7, 8]
PIECES = ([5, 6, 90], [40, 2], [9, 1, 17, 33, 4])
NO_ADAPTER = Parts(shared_lora=False, private_weight=0.0)


def row(history: list[int], pieces: tuple[list[int], ...], liked: int = 1) -> QuestionRow:
    labels = np.array([(liked + j) % 2 for j in range(len(pieces))])
    return pack(np.array(history), [np.array(piece) for piece in pieces], labels)


CLIENTS = (
    [row(HISTORY, PIECES)],
    [row([1, 2], PIECES[:2]), row([1, 2], PIECES[2:], liked=0)],
    [row([60, 61, 62, 63, 64, 65], PIECES[1:])],
)


def likelihood(cohort: TinyCohort) -> LikelihoodModel:
    layers = cohort.adapters.num_layers
    return LikelihoodModel(cohort.backbone, cohort.adapter, layers, cohort.private, ANSWERS)


def log_odds(
    model: LikelihoodModel, clients: Any, stacked: Tensors, parts: Parts | None
) -> list[torch.Tensor]:
    states = [model.trunk_states(rows) for rows in clients]
    return model.log_odds(collate_questions(clients, states), stacked, parts)


@torch.no_grad()
def plain(model: Any, rows: list[QuestionRow]) -> torch.Tensor:
    """Log-odds from the logits of a whole model that reads each question alone."""
    found = []
    for one in rows:
        for part in range(1, len(one) + 1):
            tokens = one.tokens[(one.parts == 0) | (one.parts == part)]
            logits = model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0, -1]
            found.append(logits[ANSWERS[0]] - logits[ANSWERS[1]])
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_a_question_in_a_row_is_answered_as_alone(architecture: str) -> None:
    cohort = make_cohort(architecture)
    found = log_odds(likelihood(cohort), CLIENTS, {}, None)
    for odds, rows in zip(found, CLIENTS, strict=True):
        torch.testing.assert_close(odds, plain(cohort.backbone.model, rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_read_tied_or_not(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tied,
    )  # fmt: skip
    backbone = random_backbone(config)
    weights, biases = head_rows(backbone, ANSWERS)
    embeddings = backbone.model.get_input_embeddings().weight
    assert torch.equal(weights, backbone.model.lm_head.weight[list(ANSWERS)])
    assert torch.equal(weights, embeddings[list(ANSWERS)]) is tied
    assert not biases.any()


def test_other_architectures_are_refused() -> None:
    with pytest.raises(BackboneError, match="cannot answer questions"):
        likelihood(make_cohort("qwen2_sliding"))  # a window of 4 tokens cuts questions short
    config = T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    headless = make_backbone()
    headless.model = T5ForConditionalGeneration(config).encoder
    with pytest.raises(BackboneError, match="no linear language-modelling head"):
        head_rows(headless, ANSWERS)


def test_published_adapter_gives_the_same_answers_with_plain_peft(tmp_path: Path) -> None:
    cohort = make_cohort()
    tensors = cohort.client_tensors(1)
    cohort.backbone.model.save_pretrained(tmp_path / "base")
    cohort.adapter.export_shared(tensors, tmp_path / "adapter", "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    published = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    parts = Parts(private_weight=0.0)
    (found,) = log_odds(likelihood(cohort), CLIENTS[:1], stack([tensors]), parts)
    (without,) = log_odds(likelihood(cohort), CLIENTS[:1], {}, None)
    torch.testing.assert_close(found, plain(published, CLIENTS[0]), atol=1e-4, rtol=1e-4)
    assert (found - without).abs().max() > 0.1


def test_clients_with_both_adapters_equal_peft_one_at_a_time() -> None:
    cohort = make_cohort()
    owns = [cohort.client_tensors(seed) for seed in (1, 2, 3)]
    found = log_odds(likelihood(cohort), CLIENTS, stack(owns), Parts())
    for odds, own, rows in zip(found, owns, CLIENTS, strict=True):
        peft = cohort.adapter.peft_model().eval()
        cohort.adapter.load_shared(peft, own)
        load_private(cohort.adapter, peft, cohort.private, own)
        torch.testing.assert_close(odds, plain(peft, rows), atol=1e-4, rtol=1e-4)


def test_without_adapters_the_language_model_answers() -> None:
    cohort = make_cohort()
    model, stacked = likelihood(cohort), stack([cohort.client_tensors(seed) for seed in (1, 2, 3)])
    before = log_odds(model, CLIENTS, {}, None)
    log_odds(model, CLIENTS, stacked, Parts())
    for first, again in zip(before, log_odds(model, CLIENTS, stacked, None), strict=True):
        assert torch.equal(first, again)
    for first, off in zip(before, log_odds(model, CLIENTS, stacked, NO_ADAPTER), strict=True):
        assert torch.equal(first, off)


def test_a_clients_loss_and_gradient_depend_on_its_own_tensors_alone() -> None:
    cohort = make_cohort()
    model, owns = likelihood(cohort), [cohort.client_tensors(seed) for seed in (1, 2, 3)]

    def gradients(chosen: list[int]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        rows, stacked = [CLIENTS[c] for c in chosen], stack([owns[c] for c in chosen])
        batch = collate_questions(rows, [model.trunk_states(own) for own in rows])
        losses = model.losses(batch, stacked, Parts())
        names = [name for name in stacked if "lora." in name]
        found = torch.autograd.grad(torch.stack(losses).sum(), [stacked[n] for n in names])
        return [loss.detach() for loss in losses], dict(zip(names, found, strict=True))

    losses, together = gradients([0, 1, 2])
    for client in range(3):
        (loss,), alone = gradients([client])
        torch.testing.assert_close(losses[client], loss)
        for name, value in alone.items():
            torch.testing.assert_close(together[name][client], value[0], atol=1e-5, rtol=1e-4)
            assert value.any()


def test_the_loss_is_the_mean_cross_entropy_of_the_answers() -> None:
    cohort = make_cohort()
    model = likelihood(cohort)
    batch = collate_questions(CLIENTS, [model.trunk_states(rows) for rows in CLIENTS])
    odds = model.log_odds(batch, {}, NO_ADAPTER)
    for loss, own, rows in zip(model.losses(batch, {}, NO_ADAPTER), odds, CLIENTS, strict=True):
        signs = torch.tensor([1.0 if x else -1.0 for one in rows for x in one.liked])
        torch.testing.assert_close(loss, torch.log1p((-signs * own).exp()).mean())


def test_dropout_acts_on_the_inputs_of_the_adapters() -> None:
    cohort = make_cohort()
    model, stacked = likelihood(cohort), stack([cohort.client_tensors(1)])
    batch = collate_questions(CLIENTS[:1], [model.trunk_states(CLIENTS[0])])

    def loss(rate: float) -> float:
        generators = [torch.Generator().manual_seed(0)]
        dropout = Dropout(0.0, 0.0, shared=rate, private=0.0, generators=generators)
        return model.losses(batch, stacked, Parts(), dropout)[0].item()

    (plainly,) = model.losses(batch, stacked, Parts())
    assert loss(0.0) == pytest.approx(plainly.item(), rel=1e-5)
    assert loss(0.5) == loss(0.5) != loss(0.0)


def test_answers_of_half_precision_are_near_those_of_full() -> None:
    exact = log_odds(likelihood(make_cohort()), CLIENTS, {}, None)
    half = log_odds(likelihood(make_cohort(dtype=torch.bfloat16)), CLIENTS, {}, None)
    scale = torch.cat(exact).abs().mean()
    assert (torch.cat(exact) - torch.cat(half)).abs().mean() < 0.2 * scale
    assert all(one.dtype == torch.float32 for one in half)
