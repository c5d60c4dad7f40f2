"""What the measurements of `benchmarks.likelihood` share: data, model and questions."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pfm_llm.base.processes import Processes, start_processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.schema import ExperimentConfig, parse_config
from pfm_llm.config.text import set_setting
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation.evaluator import sample_users
from pfm_llm.evaluation.metrics import per_user_auc
from pfm_llm.evaluation.openings import count_opening, counts_of, settings_hash
from pfm_llm.likelihood.few_shot import FewShotTask, draw_examples
from pfm_llm.likelihood.questions import QuestionSettings
from pfm_llm.likelihood.scorer import AskedQuestions, LikelihoodScorer
from pfm_llm.likelihood.trainer import QuestionTrainer
from pfm_llm.model.build import build_model
from pfm_llm.model.cohort import Parts
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import Mode, SharedState, Tensors
from pfm_llm.runs.environment import environment
from pfm_llm.runs.run import Corpus, load_corpus

SHOTS = (16, 64, 256)
SEEDS = (0, 1, 2)
PER_CLIENT = 4
RATES = (1e-3, 3e-3)
ROUNDS = (8, 24)
COHORT = 8
OWN_QUESTIONS, OWN_STEPS = 8, 8
SETTINGS = (
    "data.split=last_fraction",
    "tasks=[next_item,like]",
    "method=custom",
    "adapters.private.enabled=false",
    "federation.local.schedule=joint",
    "federation.server.lr_scale=1.0",
    "federation.server.lr_schedule=constant",
    "federation.server.warmup_rounds=0",
    f"federation.num_rounds={max(ROUNDS)}",
    f"federation.local.personalise_steps={OWN_STEPS}",
    "federation.local.private_lr=1e-3",
    "runtime.threads=1",
)
PRIVATE = (
    "adapters.private.enabled=true",
    "adapters.private.kind=independent",
    "adapters.private.head_rank=0",
)


@dataclass(frozen=True)
class Asked:
    """The questions of some users of a split.

    Attributes:
        held_out: Their queries.
        liked: Per query the answers.
        questions: The queries, read up to the adapted layers.
    """

    held_out: HeldOut
    liked: tuple[np.ndarray, ...]
    questions: AskedQuestions


@dataclass(frozen=True)
class Bench:
    """What all measurements share.

    Attributes:
        config: The experiment.
        data: Its data and their split.
        folder: Keeps private states while it is measured.
        task: A federation on few examples.
        validation, test: The questions of a sample of users of each split.
        costs: Seconds and tokens so far, by name.
        openings: The file that counts measurements of test.
        counted: By seed, what was counted: name of each method to a hash of its settings.
        trainers: By seed, local training on the examples of most shots; filled as needed.
    """

    config: ExperimentConfig
    data: Corpus
    folder: Path
    task: FewShotTask
    validation: Asked
    test: Asked
    costs: dict[str, float]
    openings: Path
    counted: dict[int, dict[str, str]] = field(default_factory=dict)
    trainers: dict[int, QuestionTrainer] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: ExperimentConfig, folder: Path, users: tuple[int, int], openings: Path
    ) -> "Bench":
        """Load data and model, and read the questions of a sample of users of both splits."""
        processes = start_processes(config.runtime.threads)
        data = load_corpus(config)
        task = make_task(config, data, folder, processes)
        costs: dict[str, float] = {}

        def read(held_out: HeldOut, count: int) -> Asked:
            started, name = time.perf_counter(), held_out.name
            asked = ask(task.scorer, held_out, count, config)
            costs[f"{name}_trunk_seconds"] = time.perf_counter() - started
            costs[f"{name}_tokens"] = asked.questions.num_tokens
            return asked

        validation = read(data.split.validation, users[0])
        test = read(data.split.test, users[1])
        return cls(config, data, folder, task, validation, test, costs, openings)

    @property
    def scorer(self) -> LikelihoodScorer:
        """The likelihood scorer, without a private part."""
        return self.task.scorer

    def aucs(self, asked: Asked, shared: SharedState | None) -> np.ndarray:
        """The AUC of each user, NaN without both classes; None: no adapter."""
        stacked: Tensors = {}
        parts = None
        if shared is not None:
            stacked = self.scorer.stack(shared, {}, len(asked.questions))
            parts = Parts(private_weight=0.0)
        scores = self.scorer.score(asked.questions, stacked, {Mode.SHARED_ONLY: parts})
        return per_user_auc(scores[Mode.SHARED_ONLY], asked.liked)

    def rounds(self, shots: int, seed: int, rate: float) -> Iterator[SharedState]:
        """Train on the examples of a seed, round by round.

        Args:
            shots: The number of questions, over all clients.
            seed: Of the draw of examples, of the initial LoRA and of the cohorts.
            rate: The server's learning rate.
        """
        trainer = self._trainer(seed)
        clients = trainer.client_ids[: shots // PER_CLIENT]
        cohort = min(COHORT, len(clients))
        config = with_settings(self.config, {"seed": seed, "federation.cohort_size": cohort})
        sizes = self.task.parts.private.sizes
        table = [
            dataclasses.replace(one, rate=rate) for one in parameter_table(config, sizes).values()
        ]
        parts = dataclasses.replace(self.task.parts, table=ParameterTable(table))
        yield from dataclasses.replace(self.task, config=config, parts=parts).rounds(
            trainer, clients
        )

    def _trainer(self, seed: int) -> QuestionTrainer:
        if seed not in self.trainers:
            started = time.perf_counter()
            queries = draw_examples(
                self.data.split.train.interactions,
                self.config.data.like_threshold,
                max(SHOTS),
                PER_CLIENT,
                seed,
            )
            rows = {f"user-{q.user}": self.scorer.encoder.rows(q) for q in queries}
            self.trainers[seed] = self.task.trainer(rows)
            self.costs[f"examples_s{seed}_seconds"] = time.perf_counter() - started
            self.costs[f"examples_s{seed}_tokens"] = self.trainers[seed].num_tokens
        return self.trainers[seed]

    def count(self, method: str, settings: Mapping[str, Any], seed: int) -> None:
        """Count a measurement of test before it is made. A sample of users counts as all of them.

        Args:
            method: Its name.
            settings: What it was measured with, besides `settings` and the seed.
            seed: Of the training.
        """
        key = settings_hash({**self.settings(), **settings, "seed": seed})
        count_opening(self.openings, self.data.interactions, self.data.split, {method: key})
        self.counted.setdefault(seed, {})[method] = key

    def openings_of(self, seed: int) -> dict[str, Any]:
        """How often test was measured so far for what was counted with a seed."""
        counted = self.counted.get(seed, {})
        return counts_of(self.openings, self.data.interactions, self.data.split, counted)

    def settings(self) -> dict[str, Any]:
        """How it was measured."""
        return {
            "shots": SHOTS,
            "questions_per_client": PER_CLIENT,
            "grid_rates": RATES,
            "grid_rounds": ROUNDS,
            "cohort_size": COHORT,
            "validation_users": len(self.validation.questions),
            "test_users": len(self.test.questions),
            **self.scorer.encoder.settings.model_dump(mode="json"),
        }

    def environment(self, seed: int) -> dict[str, Any]:
        """The hardware and software."""
        dtype = str(self.task.parts.backbone.dtype).removeprefix("torch.")
        return environment(seed=seed, dtype=dtype, threads=1, num_processes=1)


def with_settings(config: ExperimentConfig, values: dict[str, Any]) -> ExperimentConfig:
    """A config with other values, by dotted key."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        set_setting(tree, key, yaml.safe_load(value) if isinstance(value, str) else value)
    return parse_config(tree)


def make_task(
    config: ExperimentConfig, data: Corpus, folder: Path, processes: Processes
) -> FewShotTask:
    """Build the model over the catalogue, and the scorer on it."""
    interactions = data.interactions
    parts = build_model(config, interactions.catalogue, interactions.ratings, processes.device)
    settings = QuestionSettings()
    scorer = LikelihoodScorer.of(config, parts, interactions.catalogue, settings)
    return FewShotTask(config, parts, scorer, PrivateStore(folder), processes)


def ask(scorer: LikelihoodScorer, held_out: HeldOut, count: int, config: ExperimentConfig) -> Asked:
    """The questions about the held-out items of a fixed random sample of users."""
    threshold = config.data.like_threshold
    few = sample_users(held_out, count, config.seed)
    liked = few.liked(threshold)
    queries = [few.query(index) for index in range(len(few.users))]
    labelled = [
        dataclasses.replace(query, history=query.history.labelled(threshold)) for query in queries
    ]
    return Asked(few, liked, scorer.ask(labelled))
