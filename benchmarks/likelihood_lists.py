"""Re-ranking the first items of a run's lists by the likelihood scorer, and what that costs."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pfm_llm.data.splits import HeldOut
    from pfm_llm.likelihood.scorer import LikelihoodScorer
    from pfm_llm.protocol.types import SharedState
    from pfm_llm.runs.run import Run, Trained

LENGTH = 50
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
K = 10


def measure(
    folder: Path, scorer: "LikelihoodScorer", shared: "SharedState", count: int, openings: Path
) -> dict[str, Any]:
    """NDCG of re-ranked lists, and seconds and tokens per user of both scorers.

    The weight of the answers is chosen on validation. The test is measured if the best weight is
    not 0.

    Args:
        folder: A finished run.
        scorer: The likelihood scorer.
        shared: Its shared state.
        count: Users whose lists are re-ranked.
        openings: The file that counts measurements of test.
    """
    from pfm_llm.evaluation.evaluator import sample_users
    from pfm_llm.evaluation.openings import OPENINGS, count_opening
    from pfm_llm.runs.opening import run_in_work

    with run_in_work(folder) as (run, trained):
        found = {}
        validation = sample_users(run.data.split.validation, count, run.config.seed)
        found["validation"], costs = _reranked(run, trained, validation, scorer, shared)
        best = max(WEIGHTS, key=lambda weight: found["validation"][str(weight)]["value"])
        if best:
            data, methods = run.data, _measured(run, best, count)
            found[OPENINGS] = count_opening(openings, data.interactions, data.split, methods)
            test = sample_users(run.data.split.test, count, run.config.seed)
            found["test"], costs = _reranked(run, trained, test, scorer, shared)
    return {
        "rerank": {"length": LENGTH, "metric": f"ndcg@{K}", "weight": best, **found},
        "costs": costs,
    }


def _measured(run: "Run", weight: float, count: int) -> dict[str, str]:
    """What is measured on test: the lists as they are, and re-ranked; with their settings."""
    from pfm_llm.config.schema import training_hash
    from pfm_llm.evaluation.openings import settings_hash

    own = training_hash(run.config)[:16]
    settings = {"lists": own, "weight": weight, "users": count, "length": LENGTH}
    return {run.config.method.value: own, "likelihood_rerank": settings_hash(settings)}


def _reranked(
    run: "Run",
    trained: "Trained",
    held_out: "HeldOut",
    scorer: "LikelihoodScorer",
    shared: "SharedState",
) -> tuple[dict[str, Any], dict[str, float]]:
    """Per weight NDCG and its difference to that of the list as it is; and the costs."""
    from pfm_llm.evaluation import metrics, scoring
    from pfm_llm.evaluation.personality.estimates import Bootstrap, paired_difference

    scores, seconds = _catalogue_scores(run, trained, held_out)
    lists = [
        scoring.top_items(row, history, LENGTH)
        for row, history in zip(scores, held_out.histories, strict=True)
    ]
    odds, costs = _answers(run, held_out, [items for items, _ in lists], scorer, shared)
    found, plain = {}, None
    for weight in WEIGHTS:
        mixed = _with_lists(scores, lists, odds, weight)
        ranks = scoring.full_ranks(mixed, held_out.histories, held_out.targets)
        users = np.repeat(held_out.users, [len(own) for own in held_out.targets])
        own, _ = metrics.per_user(metrics.ndcg(ranks, K), users)
        plain = own if plain is None else plain
        over = paired_difference(own, plain, Bootstrap())
        found[str(weight)] = {"value": float(own.mean()), "over_list": dataclasses.asdict(over)}
    num = len(held_out.users)
    return found, {
        **costs,
        "embedding_seconds_per_user": seconds / num,
        "embedding_positions_per_user": float(
            np.mean([min(len(own), run.config.window.items) for own in held_out.histories])
        ),
        "embedding_tokens_once": float(sum(map(len, run.model.encoder.prompt_pieces()))),
        "catalogue": float(scores.shape[1]),
    }


def _catalogue_scores(
    run: "Run", trained: "Trained", held_out: "HeldOut"
) -> tuple[np.ndarray, float]:
    """Scores [Q, I] of the embedding scorer, and the seconds of a second pass over them."""
    from pfm_llm.evaluation.results import judged_mode
    from pfm_llm.runs.measuring import evaluation_task

    mode = judged_mode(run.config.adapters.private.enabled)
    task = evaluation_task(run, trained, held_out, [mode])
    scores = np.empty((len(held_out.users), len(run.data.interactions.catalogue)), np.float32)
    chunks = run.evaluator.chunks(task, run.config.runtime.tokens_per_chunk)
    for _ in range(2):
        started = time.perf_counter()
        for chunk in chunks:
            scored = run.evaluator.score_chunk(chunk, task)
            scores[list(scored.order)] = scored.scores[mode]
    return scores, time.perf_counter() - started


def _answers(
    run: "Run",
    held_out: "HeldOut",
    lists: list[np.ndarray],
    scorer: "LikelihoodScorer",
    shared: "SharedState",
) -> tuple[list[np.ndarray], dict[str, float]]:
    """Log-odds of the items of each list, and what they cost per user."""
    from pfm_llm.data.history import Query
    from pfm_llm.model.cohort import Parts
    from pfm_llm.protocol.types import Mode

    threshold = run.config.data.like_threshold
    queries = [
        Query(int(user), held_out.query(q).history.labelled(threshold), lists[q])
        for q, user in enumerate(held_out.users)
    ]
    started = time.perf_counter()
    asked = scorer.ask(queries)
    stacked = scorer.stack(shared, {}, len(asked))
    mode = Mode.SHARED_ONLY
    odds = scorer.score(asked, stacked, {mode: Parts(private_weight=0.0)})[mode]
    seconds = time.perf_counter() - started
    return odds, {
        "likelihood_seconds_per_user": seconds / len(queries),
        "likelihood_tokens_per_user": asked.num_tokens / len(queries),
        "likelihood_items_per_user": float(LENGTH),
    }


def _with_lists(
    scores: np.ndarray,
    lists: list[tuple[np.ndarray, np.ndarray]],
    odds: list[np.ndarray],
    weight: float,
) -> np.ndarray:
    """Scores [Q, I] in which the first items of each list stand in their new order."""
    from pfm_llm.likelihood.scorer import rerank

    mixed = scores.astype(np.float64)
    for row, (items, own), answers in zip(mixed, lists, odds, strict=True):
        order = rerank(items, own, answers, weight)
        row[order] = row.max() + np.arange(len(order), 0, -1)
    return mixed
