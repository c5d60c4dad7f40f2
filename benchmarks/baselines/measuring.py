"""From a trained baseline to its result file: measured exactly as our runs are measured.

A baseline reads the config of an experiment for its data, split, seed and evaluation. Its rows
then stand beside those of a run: same split, same masking, same negatives, ranks and metrics.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pfm_llm.base.processes import Processes, start_processes
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.config.schema import ExperimentConfig, load_config
from pfm_llm.data.splits import HeldOut, Split
from pfm_llm.evaluation import metrics, ranking
from pfm_llm.evaluation.candidates import sample_negatives
from pfm_llm.evaluation.openings import (
    OPENINGS,
    OPENINGS_FILE,
    count_opening,
    settings_hash,
)
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import ResultRow, write_results
from pfm_llm.evaluation.tables import terminal_table
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.environment import environment
from pfm_llm.runs.run import load_corpus

SELECTED_BY = "ndcg@10"
"""What is compared on validation, over the full catalogue."""

_QUERIES_AT_ONCE = 512

Score = Callable[[HeldOut, Sequence[int]], npt.NDArray[np.float32]]
"""Scores of some queries of a split, float32 [queries, num_items], higher is better."""


@dataclass(frozen=True)
class Trained:
    """A trained baseline.

    Attributes:
        method: Its name in the rows.
        budget: What it was allowed, in words.
        settings: What was chosen on validation, in plain JSON types.
        history: What was measured on validation, per setting and epoch or round, in order.
        score: Its scores.
    """

    method: str
    budget: str
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    score: Score


Train = Callable[[ExperimentConfig, Split], Trained]
"""Trains on train and chooses on validation; test is not looked at."""


def run(arguments: argparse.Namespace, train: Train) -> str:
    """Train and measure one baseline, and write its results.

    Args:
        arguments: From `cli.make_parser`.
        train: Of the baseline; the test is ranked after it.

    Returns:
        The tables of validation and test, for a terminal.

    Raises:
        PfmError: The config, the data or the output file cannot be used.
    """
    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    config = load_config(arguments.config, [*arguments.set, *seed])
    processes = start_processes(config.runtime.threads)
    corpus = load_corpus(config)
    split = corpus.split
    started = time.perf_counter()
    trained = train(config, split)
    seconds = time.perf_counter() - started
    file = arguments.openings or arguments.output.with_name(OPENINGS_FILE)
    settings = settings_hash({**trained.settings, "seed": config.seed})
    opened = count_opening(file, corpus.interactions, split, {trained.method: settings})
    rows, per_user = measure(trained, split, config)
    write_results(
        arguments.output,
        rows,
        {
            **_circumstances(config, processes),
            OPENINGS: opened,
            "costs": {"training_seconds": seconds},
            "settings": dict(trained.settings),
            "validation_history": [dict(entry) for entry in trained.history],
            "per_user": per_user,
        },
    )
    confidence = config.evaluation.confidence
    tables = [terminal_table(rows, name, confidence=confidence) for name in per_user]
    return "\n".join([*tables, f"results: {arguments.output}"])


def measure(
    trained: Trained, split: Split, config: ExperimentConfig
) -> tuple[list[ResultRow], dict[str, dict[str, list[float]]]]:
    """Rows of validation and test, and what each user got.

    Returns:
        The rows; and per split the lists ``users`` (internal ids, ascending), ``ndcg@<k>`` at the
        headline cut-off and ``log_rank`` (natural logarithm), over the full catalogue, a user's
        targets averaged: what a paired comparison needs.
    """
    rows: list[ResultRow] = []
    per_user = {}
    for held_out in (split.validation, split.test):
        ranks = rank(trained.score, held_out, negatives_of(held_out, split, config))
        describe = functools.partial(
            ResultRow,
            method=trained.method,
            mode=Mode.NONE.value,
            task="next_item",
            protocol=config.data.split.value,
            budget=trained.budget,
            split=held_out.name,
            seed=config.seed,
        )
        rows += ranking.result_rows(ranks, describe, config.evaluation, config.seed)
        k = headline_k(config.evaluation.ks)
        gains, users = metrics.per_user(metrics.ndcg(ranks.full, k), ranks.users)
        log_ranks, _ = metrics.per_user(np.log(ranks.full), ranks.users)
        per_user[held_out.name] = {
            "users": users.tolist(),
            f"ndcg@{k}": gains.tolist(),
            "log_rank": log_ranks.tolist(),
        }
    return rows, per_user


def negatives_of(held_out: HeldOut, split: Split, config: ExperimentConfig) -> np.ndarray:
    """The sampled candidates of a split, those of our runs; see `candidates.sample_negatives`."""
    num_items = len(split.train.interactions.catalogue)
    return sample_negatives(held_out, num_items, config.evaluation.num_negatives, config.seed)


def rank(score: Score, held_out: HeldOut, negatives: np.ndarray) -> Ranks:
    """Rank all targets of a split.

    Args:
        score: Of the queries of ``held_out``.
        held_out: The queries.
        negatives: From `negatives_of`.
    """
    own = functools.partial(score, held_out)
    return ranking.rank_all(own, held_out, negatives, _QUERIES_AT_ONCE)


def _circumstances(config: ExperimentConfig, processes: Processes) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "environment": environment(
            seed=config.seed,
            dtype="float32",
            threads=processes.threads,
            num_processes=processes.count,
        ),
    }
