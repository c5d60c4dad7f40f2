"""The model card: metadata that the Hub's own reader takes, and an honest text."""

from operator import attrgetter
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from pfm_llm import __version__
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.publish.card import _SETTINGS, NO_REPO, Shown, addressed_card, model_card
from tests.support.golden import assert_golden
from tests.support.privacy import SPENT

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
    interval = {"ci_low": value - 0.01, "ci_high": value + 0.02}
    return ResultRow(mode=mode, value=value, **(fields | interval | other))


CONFIG = {
    "name": "ml100k",
    "data": {"source": "movielens-100k"},
    "window": {"items": 32},
    "adapters": {
        "num_layers": 2,
        "targets": ["q_proj", "v_proj"],
        "shared": {"rank": 8, "alpha": 16},
    },
    "federation": {
        "num_rounds": 150,
        "cohort_size": 16,
        "local": {"schedule": "alternate", "shared_local_steps": 1, "private_local_steps": 1},
    },
}
SCORES = [
    score("shared_only", 0.085),
    score("shared_only", 0.66, candidates="sampled99", metric="hit_rate", k=5),
    score("shared_only", 0.5, split="validation"),
    score("shared_private", 0.093),
    score("none", 0.044, method="popularity"),
]


def card_of(base_model: str = BASE, rows=SCORES, plots=(), privacy=None, **sections: Any) -> str:
    """The card of `CONFIG` with other sections, or with other values in a section."""
    tree = dict(CONFIG)
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    config = ExperimentConfig.model_validate(tree)
    return model_card(config, base_model, "next_item.v1", 150, Shown(rows, plots, privacy))


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_whole_card() -> None:
    card = card_of(plots=("plots/loss.png", "plots/other.png"))
    assert_golden("card.txt", card.replace(f"pfm_llm {__version__}:", "pfm_llm <version>:"))


def test_the_hub_s_reader_finds_the_scores_of_the_folder_alone() -> None:
    results = ModelCard(card_of()).data.eval_results
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("ndcg@10", "NDCG@10, full catalogue", 0.085),
        ("hit_rate@5", "Hit rate@5, 99 sampled negatives", 0.66),
    ]
    assert {(r.task_type, r.dataset_name, r.dataset_split) for r in results} == {
        ("recommendation", "movielens-100k", "test")
    }


def test_every_figure_of_the_metadata_has_its_interval() -> None:
    results = ModelCard(card_of()).data.eval_results
    assert [r.metric_args for r in results] == [
        {"ci_low": 0.075, "ci_high": 0.105, "confidence": 0.95},
        {"ci_low": 0.65, "ci_high": 0.68, "confidence": 0.95},
    ]
    card = ModelCard(card_of(evaluation={"confidence": 0.9}))
    assert {r.metric_args["confidence"] for r in card.data.eval_results} == {0.9}


def test_the_metadata_come_back_from_the_client_as_they_were() -> None:
    text = card_of()
    card = ModelCard(text)
    index = front_matter(text)["model-index"]
    assert eval_results_to_model_index(card.data.model_name, card.data.eval_results) == index
    assert card.data.to_dict() == front_matter(text)


def test_a_local_base_is_no_relation_on_the_hub() -> None:
    assert "base_model_relation" not in front_matter(card_of("/models/tiny"))


def test_without_scores_there_is_no_model_index() -> None:
    card = card_of(rows=())
    assert "model-index" not in front_matter(card)
    assert ModelCard(card).data.eval_results is None


def test_text_shows_how_to_load_and_the_loading_example_is_python() -> None:
    card = addressed_card(card_of(), "someone/ml100k")
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert f"AutoModelForCausalLM.from_pretrained('{BASE}')" in snippet
    assert "PeftModel.from_pretrained(base, 'someone/ml100k')" in snippet
    assert "recommender_head.safetensors" in card
    assert "`next_item.v1`" in card


def test_the_repository_is_put_in_when_it_is_known() -> None:
    card = addressed_card(card_of(), "someone/ml100k")
    assert "PeftModel.from_pretrained(base, 'someone/ml100k')" in card
    assert "Recommender.from_pretrained('someone/ml100k')" in card
    assert NO_REPO not in card
    assert addressed_card(card, "another/name") == card


def test_use_with_pfm_llm_names_what_has_to_be_told() -> None:
    for changes, arguments in (
        ({}, ""),
        ({"data": {"source": "/data/mine.csv"}}, ', catalogue="items.csv"'),
        ({"base_model": "tiny"}, ', backbone="path/to/the/base/model"'),
    ):
        card = addressed_card(card_of(**changes), "a/b")
        snippet = card.split("```python\n")[2].split("```")[0]
        compile(snippet, "card", "exec")
        assert f"Recommender.from_pretrained('a/b'{arguments})" in snippet


def test_plots_are_shown_that_are_there() -> None:
    assert "![" not in card_of()
    card = card_of(plots=("plots/loss.png", "plots/other.png"))
    assert "![Training loss by round](plots/loss.png)\n" in card
    assert "![other](plots/other.png)\n" in card
    assert "user_gain" not in card


def test_before_the_evaluation_it_says_so() -> None:
    card = card_of(rows=(), plots=("plots/loss.png",))
    assert "It has not been evaluated yet.\n" in card
    assert "shared_only" not in card
    assert "(plots/loss.png)" in card


def test_formulas_name_the_head_s_tensors_and_only_those_there_are() -> None:
    names = ("state_proj", "item_proj", "item_bias", "item_ids", "item_ids_out", "item_ids_in")
    names += ("context_proj", "context_log_h", "context_log_n", "state_log_n")
    for head, absent in (
        ({}, ()),
        ({"item_ids": "output"}, ("item_ids_in",)),
        ({"item_ids": "none", "item_bias": False}, ("item_ids", "item_bias")),
        ({"item_context": False}, ("context",)),
    ):
        card = card_of(head=head)
        for name in names:
            missing = any(name.startswith(start) for start in absent)
            assert (f"head.{name}" in card) is not missing, name
    assert "item_keys.json[i]" in card_of()
    assert "newest 32 items" in card_of()


def test_a_card_tells_the_bias_of_items_that_nobody_met_where_it_is_learned() -> None:
    assert "head.new_text · z_i / sqrt(D) + head.new_bias" in card_of(head={"item_dropout": 0.1})
    assert "head.new" not in card_of(head={"item_dropout": 0.0})


def test_a_card_of_codes_says_which_rows_are_an_item_s() -> None:
    """`tests/e2e/test_codes.py` computes a bias from plain files as the card says."""
    head = {"item_ids": "codes", "codes": {"hash_books": 3, "hash_size": 640, "text_books": 0}}
    card = card_of(head=head)
    assert "e_i   = sum of head.item_ids[c] over the rows c of item i\nscore" in card
    assert "+ sum of head.item_bias[c]\n```" in card
    for told in ("head.item_ids_in e_i", "3 books of 640 rows", "shake_256", "modulo 8192"):
        assert told in card
    assert "centroid" not in card
    with_texts = card_of(head={**head, "codes": {"text_books": 2, "text_size": 9}})
    for told in ("2 books of 9 rows", "`codes.centroids[0]` to the first 64 dimensions of z_i"):
        assert told in with_texts
    unmasked = card_of(head={**head, "item_met": False})
    assert "head.item_met" not in unmasked
    assert "codes" not in card_of()


def test_the_formulas_are_those_of_the_head() -> None:
    # The card's lines, read as Python.
    import torch

    from pfm_llm.model import head as ours
    from pfm_llm.model.items.whitening import Normaliser
    from pfm_llm.protocol.parameters import Sizes

    settings = ExperimentConfig(name="x", head={"dim": 4, "id_dim": 3})
    generator = torch.Generator().manual_seed(0)
    head = {
        one.name: torch.randn(one.shape, generator=generator)
        for one in ours.head_parameters(settings, Sizes(6, {}, 5))
    }
    normaliser = Normaliser(
        torch.randn(6, generator=generator), torch.randn(6, 6, generator=generator)
    )
    x, t = torch.randn(6, generator=generator), torch.randn(5, 6, generator=generator)
    texts, read = normaliser(t)[:, :4], torch.tensor([[3, 0, 2]])
    context = ours.context_vectors(head, read, texts)
    assert context is not None
    vectors = ours.user_vectors(head, normaliser(x)[None], torch.tensor([3]), None, context[:, -1])
    expected = ours.score_items(head, vectors, texts)[0]
    # In the card's words, not its lines.
    items = torch.cat([texts, head["head.item_ids"]], 1)[read[0]]
    weights = 2 ** (-torch.tensor([2.0, 1, 0]) / head["head.context_log_h"].exp()[:, None])
    c = weights / weights.sum(1, keepdim=True) @ items
    c = (c * 3 / (3 + head["head.context_log_n"].exp()[:, None])).flatten()

    card = model_card(settings, BASE, "next_item.v1", 1)
    lines = card.split("## From hidden states to scores")[1].split("```")[1].strip()
    for name in sorted(head, key=len, reverse=True):
        lines = lines.replace(name, name.replace(".", "_"))
    for written, meant in (
        ("head_state_proj (", "head_state_proj @ ("),
        ("head_item_proj z", "head_item_proj @ z"),
        ("head_item_ids_out e", "head_item_ids_out @ e"),
        ("head_context_proj c", "head_context_proj @ c"),
        ("·", "@"),
        ("sqrt(D)", "D ** 0.5"),
        ("exp(head_state_log_n)", "head_state_log_n.exp()"),
        ("\nz_i   = ((t_i", "\nz_i   = ((t[i]"),
    ):
        assert written in lines
        lines = lines.replace(written, meant)
    for i in range(5):
        scope = {name.replace(".", "_"): value for name, value in head.items()}
        scope |= {"x": x, "t": t, "c": c, "r": 3, "i": i, "D": 4, "normaliser": normaliser}
        exec(lines, scope)  # noqa: S102
        torch.testing.assert_close(scope["score"], expected[i])


def test_the_embedded_base_is_explained_and_no_other() -> None:
    assert "Q4_1" in card_of()
    assert "Q4_1" not in card_of(backbone={"name": BASE})


def test_terms_of_movielens_are_told_when_it_is_the_data() -> None:
    for dataset in ("movielens-100k", "/data/ml-1m"):
        card = card_of(data={"source": dataset})
        assert "GroupLens" in card
        assert "not to be\nredistributed" in card
    card = card_of(data={"source": "/data/mine.csv"})
    assert "GroupLens" not in card
    assert "The data, mine.csv, are not in this folder" in card
    assert "Paths in the config are reduced to names" in card


def test_an_adapter_that_it_went_on_from_is_named() -> None:
    started = card_of(init_from={"adapter": "bob/films"})
    assert "went on from another adapter, `bob/films`" in started
    assert "went on from" not in card_of()


def test_every_listed_setting_exists_in_the_config() -> None:
    for key in _SETTINGS:
        attrgetter(key)(ExperimentConfig(name="x"))


@pytest.mark.parametrize(
    "path", ["/home/someone/models/tiny", "./models/tiny", "~/tiny", "a/b/tiny"]
)
def test_local_paths_are_not_published(path) -> None:
    card = card_of(path, data={"source": path})
    assert path not in card
    front = front_matter(card)
    assert "base_model" not in front
    assert front["datasets"] == ["tiny"]
    assert "from_pretrained('tiny')" in card
    assert "huggingface.co/tiny" not in card


def test_braces_in_what_is_told_stay_as_they_are() -> None:
    assert "from_pretrained('{x}')" in card_of("/models/{x}")


def test_a_card_says_what_is_private_and_against_whom() -> None:
    card = card_of(rows=(), privacy=SPENT)
    assert "(ε, δ) = (7.95, 1e-05) over the whole training" in card
    assert "norm\n  0.5," in card
    assert "Gaussian noise of 1.201 times that on the sum of each of 80 rounds" in card
    assert "sampling amplifies nothing" in card
    assert "It does not hold against the\n  server" in card
    assert "Figures that were measured on users are not covered" in card
    assert "No differential privacy" not in card
    assert front_matter(card)["tags"][-1] == "differential-privacy"
    assert front_matter(card_of())["tags"][-1] == "no-differential-privacy"


def test_a_card_says_that_what_a_private_training_started_from_is_not_covered() -> None:
    started = card_of(rows=(), privacy=SPENT, init_from={"adapter": "someone/else"})
    assert "is not covered: what it tells of its own users" in started
    assert "is not covered: what" not in card_of(rows=(), privacy=SPENT)
