"""Tests of pfm_llm.model.ablation."""

from typing import Any

import pytest

from pfm_llm.config.choices import Ablation
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model import ablation
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import Sizes

CATALOGUE = Catalogue(
    tuple(map(str, range(30))),
    {
        "title": tuple(f"title {i}" for i in range(30)),
        "year": tuple(f"{1970 + i}" for i in range(30)),
    },
)


def config(what: Ablation, **settings: Any) -> ExperimentConfig:
    return ExperimentConfig(name="x", ablation=what, **settings)


def test_without_a_pass_what_only_it_uses_is_neither_trained_nor_sent() -> None:
    sizes = Sizes(300, {"layers.29.o_proj": (300, 300)}, 7)
    whole = parameter_table(config(Ablation.NONE), sizes)
    without = parameter_table(config(Ablation.NO_PASS), sizes)
    assert without.specs == whole.specs
    assert whole.sent.keys() - without.sent.keys() == {
        "lora.layers.29.o_proj.A",
        "lora.layers.29.o_proj.B",
        "basis.hyper_lora.layers.29.o_proj.A",
        "basis.hyper_lora.layers.29.o_proj.B",
        "basis.hyper_lora.layers.29.o_proj.coefficients",
        "head.state_proj",
        "head.state_log_n",
        "head.item_ids_in",
    }
    assert "basis.hyper_lora.output" in without.sent  # scores follow from the context too


@pytest.mark.parametrize("what", Ablation)
def test_only_shuffled_texts_change_what_is_read(what: Ablation) -> None:
    read = ablation.texts_of(config(what), CATALOGUE)
    assert read.item_ids == CATALOGUE.item_ids
    if what is not Ablation.SHUFFLED_TEXTS:
        assert read is CATALOGUE
        return
    texts = list(zip(*read.fields.values(), strict=True))
    own = list(zip(*CATALOGUE.fields.values(), strict=True))
    assert sorted(texts) == sorted(own)  # whole texts moved: a title keeps its year
    assert sum(a == b for a, b in zip(texts, own, strict=True)) < 5
    other = ablation.texts_of(config(what, seed=1), CATALOGUE)
    assert other.fields != read.fields
