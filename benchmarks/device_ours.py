"""What `benchmarks.device` compares llama.cpp with: LoRAs, questions, and our own answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import likelihood_bench as common
from pfm_llm.base.processes import start_processes
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.schema import ExperimentConfig, load_config
from pfm_llm.config.shipped import find_config
from pfm_llm.data.history import Query
from pfm_llm.likelihood.few_shot import FewShotTask, draw_examples, newest_questions
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import Mode, SharedState, Tensors
from pfm_llm.publish.device.export import export_gguf
from pfm_llm.runs.run import Corpus, load_corpus

SHOTS, ROUNDS, SEED = 64, 8, 0
"""As `benchmarks.likelihood` has chosen them on validation, with the rate of the config."""
MIXTURES = {
    "none": (0.0, 0.0),
    "shared": (1.0, 0.0),
    "private": (0.0, 1.0),
    "both": (1.0, 1.0),
    "half": (1.0, 0.5),
}
"""Name of a mixture to the factors of the shared and of the private LoRA."""


@dataclass(frozen=True)
class TrainedLoras:
    """What was trained, and what is asked.

    Attributes:
        data: The data.
        task: The model and the scorer, with private LoRAs.
        shared: The shared state.
        private: The users' private tensors [users, ...].
        queries: Per user a history and items that are not in it.
    """

    data: Corpus
    task: FewShotTask
    shared: SharedState
    private: Tensors
    queries: list[Query]

    @classmethod
    def of(
        cls, config_name: str, overrides: Sequence[str], counts: tuple[int, int], folder: Path
    ) -> "TrainedLoras":
        """Train a shared LoRA, and private ones of users who are drawn at random.

        Args:
            config_name: A shipped config, or a file.
            overrides: Other settings.
            counts: How many users there are, and how many items in question each has.
            folder: Keeps private states.
        """
        settings = [*common.SETTINGS, "backbone.dtype=float32", f"seed={SEED}"]
        settings += [f"federation.cohort_size={common.COHORT}", f"federation.num_rounds={ROUNDS}"]
        config = load_config(find_config(config_name), [*settings, *overrides])
        processes, data = start_processes(config.runtime.threads), load_corpus(config)
        shared = _shared(common.make_task(config, data, folder, processes), data)
        own = common.with_settings(config, dict(one.split("=") for one in common.PRIVATE))
        task = common.make_task(own, data, folder, processes)
        users = _users(data, counts[0])
        private = _private(task, data, users, shared)
        queries = _queries(data, config, users, counts[1])
        return cls(data, task, shared, private, queries)

    @property
    def answers(self) -> tuple[int, int]:
        """The tokens of yes and of no."""
        return self.task.scorer.encoder.answers

    def prompts(self, user: int) -> list[list[int]]:
        """The token ids of each question to the user at a place."""
        rows = self.task.scorer.encoder.rows(self.queries[user])
        return [prompt for row in rows for prompt in row.prompts()]

    @property
    def num_tokens(self) -> int:
        """The tokens of all questions, with each history once in a row."""
        encoder = self.task.scorer.encoder
        return sum(len(row.tokens) for query in self.queries for row in encoder.rows(query))

    def scores(self) -> dict[str, np.ndarray]:
        """Our log-odds by mixture, float32 [users, items]."""
        return _scores(self.task, self)

    def scores_in_bfloat16(self, folder: Path) -> np.ndarray:
        """Our log-odds with both LoRAs, where the language model computes in bfloat16."""
        config = common.with_settings(self.task.config, {"backbone.dtype": "bfloat16"})
        task = common.make_task(config, self.data, folder / "bfloat16", self.task.processes)
        return _scores(task, self)["both"]

    def export(self, folder: Path, base: Path) -> tuple[Path, list[Path], list[Path]]:
        """Write the GGUF files: of the shared LoRA, of each user's own, and of each user's two."""
        parts = self.task.parts
        name = parts.backbone.portable_name
        parts.adapter.export_shared(self.shared.tensors, folder / "shared", name)
        own, cat = [], []
        for user in range(len(self.queries)):
            tensors = {key: value[user] for key, value in self.private.items()}
            mine, out = folder / f"mine-{user}", folder / f"device-{user}"
            parts.export_private({**self.shared.tensors, **tensors}, 1.0, mine)
            shared, private = export_gguf(folder / "shared", mine, out, base)
            own.append(private)
            cat += export_gguf(folder / "shared", mine, folder / f"cat-{user}", base, cat=True)
        return shared, own, cat


def _shared(task: FewShotTask, data: Corpus) -> SharedState:
    """The shared state after all rounds."""
    examples = draw_examples(
        data.split.train.interactions,
        task.config.data.like_threshold,
        SHOTS,
        common.PER_CLIENT,
        SEED,
    )
    trainer = task.trainer({f"user-{q.user}": task.scorer.encoder.rows(q) for q in examples})
    *_, shared = task.rounds(trainer)
    return shared


def _users(data: Corpus, count: int) -> list[int]:
    train = data.split.train.interactions
    shuffled = numpy_generator(SEED, "device/users").permutation(train.num_users).tolist()
    return [u for u in shuffled if len(train.history(u)) > common.OWN_QUESTIONS][:count]


def _private(task: FewShotTask, data: Corpus, users: Sequence[int], shared: SharedState) -> Tensors:
    """The private tensors after steps on each user's newest training events."""
    train, threshold = data.split.train.interactions, task.config.data.like_threshold
    own = {
        f"user-{user}": task.scorer.encoder.rows(
            newest_questions(train, user, threshold, common.OWN_QUESTIONS)
        )
        for user in users
    }
    return task.trainer(own).personalise(list(own), shared)


def _queries(
    data: Corpus, config: ExperimentConfig, users: Sequence[int], count: int
) -> list[Query]:
    """Questions about items that each user has never met, after the training history."""
    queries = []
    for user in users:
        random = numpy_generator(SEED, f"device/items/{user}")
        everything = np.arange(len(data.interactions.catalogue))
        unmet = np.setdiff1d(everything, data.interactions.history(user))
        history = data.split.train.interactions.history_of(user)
        items = random.choice(unmet, count, replace=False)
        queries.append(Query(user, history.labelled(config.data.like_threshold), items))
    return queries


def _scores(task: FewShotTask, trained: TrainedLoras) -> dict[str, np.ndarray]:
    asked = task.scorer.ask(trained.queries)
    stacked = task.scorer.stack(trained.shared, trained.private, len(asked))
    found = {}
    for name, (shared, private) in MIXTURES.items():
        parts = {Mode.SHARED_PRIVATE: Parts(bool(shared), private)}
        found[name] = np.stack(task.scorer.score(asked, stacked, parts)[Mode.SHARED_PRIVATE])
    return found
