"""The model card: metadata that the Hub's own reader takes, and an honest text."""

import dataclasses

import pytest
import yaml
from huggingface_hub import ModelCard

from pfm_llm.config import ExperimentConfig
from pfm_llm.model_card import CardFacts, model_card
from pfm_llm.run_report import ResultRow, results_table

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def score(mode: str, value: float, **other) -> ResultRow:
    fields = {
        "method": "pfm",
        "task": "next_item",
        "protocol": "leave_last_out",
        "budget": "",
        "split": "test",
        "candidates": "full",
        "metric": "ndcg",
        "k": 10,
        "num_users": 943,
        "seed": 0,
    }
    return ResultRow(mode=mode, value=value, ci_low=value, ci_high=value, **(fields | other))


SCORES = [
    score("shared_only", 0.085),
    score("shared_only", 0.66, candidates="sampled99", metric="hit_rate", k=5),
    score("shared_only", 0.5, split="validation"),
    score("shared_private", 0.093),
    score("none", 0.044, method="popularity"),
]


@pytest.fixture
def facts() -> CardFacts:
    return CardFacts(
        name="ml100k",
        base_model=BASE,
        prompt="next_item.v1",
        dataset="movielens-100k",
        rounds=150,
        scores=SCORES,
        results_table=results_table(SCORES),
        config=ExperimentConfig(name="ml100k").model_dump(mode="json"),
    )


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_names_base_library_license_and_a_valid_task(facts) -> None:
    front = front_matter(model_card(facts))
    assert front["base_model"] == BASE
    assert front["library_name"] == "peft"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "feature-extraction"
    assert front["datasets"] == ["movielens-100k"]
    assert "federated-learning" in front["tags"]


def test_the_hub_s_reader_finds_the_scores_of_the_folder_alone(facts) -> None:
    results = ModelCard(model_card(facts)).data.eval_results
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("ndcg@10", "NDCG@10, full catalogue", 0.085),
        ("hit_rate@5", "Hit rate@5, 99 sampled negatives", 0.66),
    ]
    assert {(r.task_type, r.dataset_name, r.dataset_split) for r in results} == {
        ("recommendation", "movielens-100k", "test")
    }


def test_without_scores_there_is_no_model_index(facts) -> None:
    card = model_card(dataclasses.replace(facts, scores=[], results_table="No results.\n"))
    assert "model-index" not in front_matter(card)
    assert ModelCard(card).data.eval_results is None


def test_text_shows_how_to_load_and_the_loading_example_is_python(facts) -> None:
    card = model_card(dataclasses.replace(facts, adapter="someone/ml100k"))
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert f"AutoModelForCausalLM.from_pretrained('{BASE}')" in snippet
    assert "PeftModel.from_pretrained(base, 'someone/ml100k')" in snippet
    assert "recommender_head.safetensors" in card
    assert "`next_item.v1`" in card


def test_text_says_what_privacy_there_is_and_is_not(facts) -> None:
    card = model_card(facts)
    assert "**No differential privacy**" in card
    assert "Private adapters and histories are never in this folder" in card
    assert "*single* client's update" in card


def test_text_holds_the_results_table_and_says_which_row_the_folder_gives(facts) -> None:
    card = model_card(facts)
    assert results_table(SCORES) in card
    assert "This folder alone gives the `shared_only` row" in card


def test_settings_come_from_the_config_and_missing_ones_are_left_out(facts) -> None:
    card = model_card(facts)
    assert "| Clients per round | 16 |" in card
    assert "| LoRA rank | 8 |" in card
    assert "| Server optimizer | fedadam |" in card
    assert "in 150 rounds" in card
    few = model_card(dataclasses.replace(facts, config={"seed": 3, "head": None}))
    assert "| Seed | 3 |" in few
    assert "LoRA rank" not in few


def test_every_listed_setting_exists_in_the_config(facts) -> None:
    from pfm_llm.model_card import _SETTINGS

    card = model_card(facts)
    assert [label for label in _SETTINGS.values() if f"| {label} | " not in card] == []


@pytest.mark.parametrize(
    "path", ["/home/someone/models/tiny", "./models/tiny", "~/tiny", "a/b/tiny"]
)
def test_local_paths_are_not_published(facts, path) -> None:
    card = model_card(dataclasses.replace(facts, base_model=path, dataset=path))
    assert path not in card
    front = front_matter(card)
    assert "base_model" not in front
    assert front["datasets"] == ["tiny"]
    assert "from_pretrained('tiny')" in card
    assert "huggingface.co/tiny" not in card


def test_a_note_on_the_base_weights_stands_by_the_loading_example(facts) -> None:
    card = model_card(dataclasses.replace(facts, base_note="Weights were dequantised from Q4_1."))
    assert "\nWeights were dequantised from Q4_1.\n\nThis gives hidden states." in card
    assert "```\n\nThis gives hidden states." in model_card(facts)


def test_braces_in_what_is_told_stay_as_they_are(facts) -> None:
    assert "Weights of {x}." in model_card(dataclasses.replace(facts, base_note="Weights of {x}."))
