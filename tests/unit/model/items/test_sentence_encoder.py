"""Tests of pfm_llm.model.items.sentence_encoder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pfm_llm.base.errors import BackboneError
from pfm_llm.config.model import ItemsConfig
from pfm_llm.model.items.sentence_encoder import load_sentence_encoder
from tests.support.tiny import TITLES, write_encoder

TEXTS = ["red fish", "old blue boat and a red song", "tree", "red fish"]


def encoder(folder: Path, pooling: str | None = None, **settings: int):
    write_encoder(folder, pooling)
    return load_sentence_encoder(ItemsConfig(encoder=str(folder), **settings))


@pytest.mark.parametrize("pooling", [None, "pooling_mode_mean_tokens", "pooling_mode_cls_token"])
def test_a_vector_is_the_mean_of_the_tokens_or_the_first_one(
    pooling: str | None, tmp_path: Path
) -> None:
    found = encoder(tmp_path, pooling)(TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = states[0] if pooling and "cls" in pooling else states.mean(0)
        torch.testing.assert_close(vector, pooled / pooled.norm(), atol=1e-5, rtol=1e-5)
    assert found.dtype is torch.float32
    assert encoder is not None


def test_a_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    vectors = encoder(tmp_path, max_tokens=2)
    assert torch.allclose(vectors(["red fish"]), vectors(["red fish and a boat"]), atol=1e-6)


def test_another_pooling_or_other_weights_are_another_encoder(tmp_path: Path) -> None:
    mean = encoder(tmp_path / "a", "pooling_mode_mean_tokens").identity
    assert encoder(tmp_path / "b").identity == mean
    assert encoder(tmp_path / "c", "pooling_mode_cls_token").identity != mean
    write_encoder(tmp_path / "d", width=16)
    other = load_sentence_encoder(ItemsConfig(encoder=str(tmp_path / "d")))
    assert other.identity != mean
    assert other.width == 16


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"cannot load the encoder .*minilm"):
        load_sentence_encoder(ItemsConfig(encoder=str(tmp_path)))
    with pytest.raises(BackboneError, match="pooling_mode_max_tokens; choose an encoder"):
        encoder(tmp_path / "max", "pooling_mode_max_tokens")


def test_many_texts_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    vectors = encoder(tmp_path)
    many = vectors([*TITLES] * 5)
    alone = torch.cat([vectors([title]) for title in TITLES])
    torch.testing.assert_close(many[: len(TITLES)], alone, atol=1e-5, rtol=1e-5)
