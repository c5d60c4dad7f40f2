"""Few-shot training by the federated engine, on a tiny world with ratings."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.data.history import Query
from pfm_llm.data.interactions import Interactions
from pfm_llm.likelihood.few_shot import FewShotTask, draw_examples, newest_questions
from pfm_llm.likelihood.questions import QuestionSettings
from pfm_llm.likelihood.scorer import LikelihoodScorer
from pfm_llm.model.build import build_model
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import ClientUpdate, Mode, SharedState, Tensors
from pfm_llm.runs.run import load_corpus
from pfm_llm.text.questions import load_question
from tests.conftest import TinyConfig, TinyRun
from tests.support.tiny import NUM_USERS, TITLES, write_interactions

PAGE = Path(__file__).parents[3] / "docs" / "likelihood.md"
THRESHOLD = 4.0
PROMPT = """
name = "tiny"
version = 1
description = "Answers that are tokens of the tiny tokenizer."
header = "H:"
liked = "+"
disliked = "-"
item = "{title};"
question = "like {title}?"
answer = "A:"
yes = "a"
no = "b"
fields = ["title"]
"""

MakeTask = Callable[..., tuple[FewShotTask, Interactions]]


@pytest.fixture(name="task")
def make_task(tiny_config: TinyConfig, one_process: Processes, tmp_path: Path) -> MakeTask:
    """A few-shot task of the tiny world, and its training interactions."""
    prompt = tmp_path / "tiny.v1.toml"
    prompt.write_text(PROMPT)
    draw = random.Random(0)
    histories = {f"u{user}": draw.sample(range(len(TITLES)), 25) for user in range(NUM_USERS)}
    source = write_interactions(tmp_path / "rated.csv", histories, ratings=True)

    def make(**settings: object) -> tuple[FewShotTask, Interactions]:
        chosen = {
            "data__source": str(source),
            "data__split": "last_fraction",
            "federation__local__schedule": "joint",
            "adapters__private__head_rank": 0,
            "federation__cohort_size": 3,
            "federation__server__lr_lora": 1e-2,
        }
        config = tiny_config(**{**chosen, **settings})
        data = load_corpus(config)
        catalogue = data.interactions.catalogue
        parts = build_model(config, catalogue, data.interactions.ratings, torch.device("cpu"))
        questions = QuestionSettings(prompt=str(prompt), shown_items=4)
        scorer = LikelihoodScorer.of(config, parts, catalogue, questions)
        store = PrivateStore(tmp_path / "private")
        task = FewShotTask(config, parts, scorer, store, one_process)
        return task, data.split.train.interactions

    return make


def examples(task: FewShotTask, queries: list[Query]) -> dict[str, list]:  # type: ignore[type-arg]
    return {f"user-{query.user}": task.scorer.encoder.rows(query) for query in queries}


def updates(
    task: FewShotTask, queries: list[Query], chunks: list[list[str]]
) -> dict[str, ClientUpdate]:
    trainer = task.trainer(examples(task, queries))
    found = [trainer.train_chunk(chunk, task.initial()) for chunk in chunks]
    return {one.client_id: one for part in found for one in part}


# --- examples


def test_fewer_shots_are_the_first_of_more(task: MakeTask) -> None:
    _, train = task()
    few, many = (draw_examples(train, THRESHOLD, shots, 2, seed=1) for shots in (6, 12))
    other = draw_examples(train, THRESHOLD, 6, 2, seed=2)
    assert [one.user for one in many][:3] == [one.user for one in few]
    assert [one.user for one in other] != [one.user for one in few]
    assert len({one.user for one in many}) == 6


def test_examples_are_stretches_of_training_histories(task: MakeTask) -> None:
    _, train = task()
    for one in draw_examples(train, THRESHOLD, 12, 2, seed=0):
        own = train.history_of(one.user)
        start = len(one.history)
        assert start >= 10
        assert one.history.items.tolist() == own.items[:start].tolist()
        assert one.targets.tolist() == own.items[start : start + 2].tolist()
        assert own.ratings is not None
        assert one.liked is not None
        assert one.liked.tolist() == (own.ratings[start : start + 2] >= THRESHOLD).tolist()


def test_newest_questions_end_the_training_history(task: MakeTask) -> None:
    _, train = task()
    one = newest_questions(train, 0, THRESHOLD, 3)
    together = np.concatenate([one.history.items, one.targets])
    assert together.tolist() == train.history(0).tolist()
    assert len(one.targets) == 3


def test_what_cannot_be_drawn_is_an_error(task: MakeTask) -> None:
    _, train = task()
    with pytest.raises(ConfigError, match="no multiple of 2"):
        draw_examples(train, THRESHOLD, 5, 2, seed=0)
    with pytest.raises(DataError, match="lower the number of shots"):
        draw_examples(train, THRESHOLD, 400, 2, seed=0)
    with pytest.raises(DataError, match="4000 questions need more"):
        newest_questions(train, 0, THRESHOLD, 4000)
    with pytest.raises(DataError, match="likes need ratings"):
        draw_examples(replace(train, ratings=None), THRESHOLD, 4, 2, seed=0)


# --- training


def test_training_lowers_the_loss_of_its_examples(task: MakeTask) -> None:
    made, train = task(adapters__private__enabled=False, federation__num_rounds=30)
    queries = draw_examples(train, THRESHOLD, 12, 2, seed=0)
    trainer = made.trainer(examples(made, queries))

    def loss(shared: SharedState) -> float:
        found = trainer.train_chunk(trainer.client_ids, shared)
        return float(np.mean([update.loss for update in found]))

    *_, last = made.rounds(trainer)
    assert last.round_number == 30
    assert loss(last) < loss(made.initial()) - 0.05


def test_only_lora_is_sent_and_nothing_private(task: MakeTask) -> None:
    made, train = task()
    queries = draw_examples(train, THRESHOLD, 6, 2, seed=0)
    found = updates(made, queries, [[f"user-{query.user}" for query in queries]])
    for update in found.values():
        assert update.delta
        assert all(name.startswith("lora.") for name in update.delta)
        assert update.num_examples == 2
    states = [made.store.load(client) for client in found]
    assert all(state and any(v.any() for v in state.tensors.values()) for state in states)


def test_chunks_do_not_matter(task: MakeTask) -> None:
    made, train = task(adapters__private__enabled=False)
    queries = draw_examples(train, THRESHOLD, 6, 2, seed=0)
    ids = [f"user-{query.user}" for query in queries]
    together = updates(made, queries, [ids])
    for client, alone in updates(made, queries, [[one] for one in ids]).items():
        assert alone.loss == pytest.approx(together[client].loss, rel=1e-5)
        for name, value in alone.delta.items():
            torch.testing.assert_close(value, together[client].delta[name], atol=1e-5, rtol=1e-4)


def test_a_shared_basis_is_trained_too(task: MakeTask) -> None:
    kind = {"adapters__private__kind": "shared_basis"}
    made, train = task(federation__local__schedule="alternate", **kind)
    queries = draw_examples(train, THRESHOLD, 4, 2, seed=0)
    found = updates(made, queries, [[f"user-{query.user}" for query in queries]])
    (first, _) = found.values()
    bases = [name for name in first.delta if name.startswith("basis.")]
    assert len(bases) == len(made.parts.adapter.modules)
    assert any(first.delta[name].any() for name in bases)


def test_private_steps_fit_the_answers_of_their_user(task: MakeTask) -> None:
    made, train = task(federation__local__personalise_steps=20, federation__local__private_lr=1e-2)
    queries = [newest_questions(train, user, THRESHOLD, 3) for user in (0, 1)]
    trainer = made.trainer(examples(made, queries))
    private = trainer.personalise(trainer.client_ids, made.initial())
    assert all(name.startswith("private.") for name in private)
    scorer, asked = made.scorer, made.scorer.ask(queries)
    stacked = scorer.stack(made.initial(), private, 2)
    modes = {Mode.ZERO_SHOT: None, Mode.SHARED_PRIVATE: Parts()}
    found = scorer.score(asked, stacked, modes)

    def likelihood(mode: Mode, query: int) -> float:
        liked = queries[query].liked
        assert liked is not None
        signed = np.where(liked, 1, -1) * found[mode][query]
        return float(-np.logaddexp(0, -signed).mean())

    for query in range(2):
        assert likelihood(Mode.SHARED_PRIVATE, query) > likelihood(Mode.ZERO_SHOT, query)


def test_an_example_needs_an_answer(task: MakeTask) -> None:
    made, train = task()
    unanswered = replace(newest_questions(train, 0, THRESHOLD, 2), liked=None)
    with pytest.raises(DataError, match="example without an answer"):
        made.trainer(examples(made, [unanswered]))


# --- scoring


def test_users_are_scored_as_if_alone(task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    made, train = task()
    scorer = made.scorer
    queries = [newest_questions(train, user, THRESHOLD, 2 + user) for user in range(3)]
    shared = SharedState({n: v + 0.1 for n, v in made.initial().tensors.items()})
    modes = {Mode.SHARED_ONLY: Parts(private_weight=0.0)}

    def scores(own: list[Query]) -> list[np.ndarray]:
        none: Tensors = {}
        return scorer.score(scorer.ask(own), scorer.stack(shared, none, len(own)), modes)[
            Mode.SHARED_ONLY
        ]

    together = scores(queries)
    assert [len(one) for one in together] == [2, 3, 4]
    monkeypatch.setattr("pfm_llm.likelihood.scorer._TOKENS_AT_ONCE", 50)
    for found in (scores(queries), [scores([query])[0] for query in queries]):
        for one, expected in zip(found, together, strict=True):
            np.testing.assert_allclose(one, expected, atol=1e-5)


def test_the_example_of_the_docs_runs(
    task: MakeTask, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, _ = task()
    prompt = load_question(str(tmp_path / "tiny.v1.toml"))
    monkeypatch.setattr("pfm_llm.likelihood.scorer.load_question", lambda _: prompt)
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    run = tiny_run(data__source=made.config.data.source)
    odds = names["would_like"](run, made.initial(), "u3", np.array([4, 9]))
    assert odds.shape == (2,)
    assert odds[0] != odds[1]
