"""Measure the likelihood scorer on films: few-shot AUC of likes, re-ranking, and cost per user.

The shared LoRA is trained on few questions by the federated engine, four questions for each client.
Learning rate and rounds are chosen on validation, by the mean AUC over the seeds, and the test is
scored once. The list that is re-ranked comes from a finished run on the same split, which is named
by ``--run``::

    pfm train --config ml100k --set data.split=last_fraction tasks=[next_item,like]
    python benchmarks/likelihood.py --run runs/ml100k
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from benchmarks.likelihood_bench import Bench
    from pfm_llm.evaluation.results import ResultRow
    from pfm_llm.protocol.types import SharedState

Chosen = dict[int, dict[str, float]]
"""Number of shots to the learning rate and the rounds that validation chose."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run on the same split")
    parser.add_argument("--config", default="ml100k")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--validation-users", type=int, default=80)
    parser.add_argument("--test-users", type=int, default=150)
    parser.add_argument("--private-users", type=int, default=30)
    parser.add_argument("--listed-users", type=int, default=30, help="users of re-ranked lists")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "likelihood")
    parser.add_argument(
        "--openings", type=Path, default=ROOT / "results" / "test_openings.json", metavar="FILE",
        help="file that counts measurements of test (default: that of the results)",
    )  # fmt: skip
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Measure everything, and write one result file for each seed."""
    from benchmarks import likelihood_lists
    from benchmarks.likelihood_bench import COHORT, SEEDS, SETTINGS, Bench
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config

    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"federation.cohort_size={COHORT}", *arguments.settings]
        config = load_config(find_config(arguments.config), settings)
        users = arguments.validation_users, arguments.test_users
        bench = Bench.of(config, Path(folder), users, arguments.openings)
        _say(f"questions are read: {bench.costs}")
        chosen, grid = choose(bench)
        _say(f"chosen on validation: {chosen}")
        count_shots(bench, chosen)
        found, trained = measure_shots(bench, chosen)
        extra: dict[str, Any] = {"grid": grid, "chosen": {str(k): v for k, v in chosen.items()}}
        write(bench, arguments.out, found, extra)
        few = arguments.listed_users
        rated = bench.scorer, trained[64, SEEDS[0]]
        lists = likelihood_lists.measure(arguments.run, *rated, few, arguments.openings)
        bench.costs.update(lists.pop("costs"))
        write(bench, arguments.out, found, extra | lists)
        private = measure_private(bench, trained, arguments.private_users)
        write(bench, arguments.out, found, extra | lists | {"private": private})
    for seed, rows in found.items():
        for row in rows:
            figure = f"{row.metric} {row.value:.4f} [{row.ci_low:.4f}, {row.ci_high:.4f}]"
            _say(f"seed {seed}: {row.method}, {row.budget}: {figure}")


def write(
    bench: "Bench", folder: Path, found: "dict[int, list[ResultRow]]", extra: dict[str, Any]
) -> None:
    """Write what is measured so far: one file for each seed."""
    from pfm_llm.evaluation.openings import OPENINGS
    from pfm_llm.evaluation.results import write_results

    for seed, rows in found.items():
        about = {
            "config": bench.config.model_dump(mode="json"),
            "questions": bench.settings(),
            "environment": bench.environment(seed),
            "costs": bench.costs,
            OPENINGS: bench.openings_of(seed),
        }
        write_results(folder / f"films-s{seed}.json", rows, about | extra)


def choose(bench: "Bench") -> tuple[Chosen, list[dict[str, Any]]]:
    """The learning rate and the rounds of each number of shots, by the mean AUC on validation."""
    from benchmarks.likelihood_bench import RATES, ROUNDS, SEEDS, SHOTS

    started = time.perf_counter()
    grid: list[dict[str, Any]] = []
    for shots in SHOTS:
        for rate in RATES:
            aucs: dict[int, list[float]] = {rounds: [] for rounds in ROUNDS}
            for seed in SEEDS:
                for number, shared in enumerate(bench.rounds(shots, seed, rate), 1):
                    if number in aucs:
                        aucs[number].append(float(np.nanmean(bench.aucs(bench.validation, shared))))
            for rounds, own in aucs.items():
                grid.append({"shots": shots, "rate": rate, "rounds": rounds, "auc": own})
                _say(f"{grid[-1]}")
    bench.costs["grid_seconds"] = time.perf_counter() - started
    chosen = {}
    for shots in SHOTS:
        own_grid = [one for one in grid if one["shots"] == shots]
        best = max(own_grid, key=lambda one: float(np.mean(one["auc"])))
        chosen[shots] = {"rate": best["rate"], "rounds": best["rounds"]}
    return chosen, grid


def count_shots(bench: "Bench", chosen: Chosen) -> None:
    """Count that `measure_shots` measures test: with each seed, and once for the baselines."""
    from benchmarks.likelihood_bench import SEEDS
    from pfm_llm.evaluation.baselines.likes import LIKE_RATE, LIKE_RIDGE

    for seed in SEEDS:
        bench.count("likelihood", {"chosen": {str(k): v for k, v in chosen.items()}}, seed)
    for name in (LIKE_RATE, LIKE_RIDGE):
        bench.count(name, {}, SEEDS[0])


def measure_shots(
    bench: "Bench", chosen: Chosen
) -> "tuple[dict[int, list[ResultRow]], dict[tuple[int, int], SharedState]]":
    """Per seed the rows of the test, beside those of the baselines; and the trained states."""
    from benchmarks.likelihood_bench import SEEDS

    zero_shot = bench.aucs(bench.test, None)
    baselines = _baselines(bench)
    rows, trained = {}, {}
    for seed in SEEDS:
        aucs = {("likelihood", "0 shots"): zero_shot, **baselines}
        for shots, setting in chosen.items():
            states = bench.rounds(shots, seed, setting["rate"])
            for _ in range(int(setting["rounds"])):
                trained[shots, seed] = next(states)
            aucs["likelihood", f"{shots} shots"] = bench.aucs(bench.test, trained[shots, seed])
        rows[seed] = _rows(bench, aucs, seed)
    return rows, trained


def measure_private(
    bench: "Bench", trained: "dict[tuple[int, int], SharedState]", count: int
) -> dict[str, Any]:
    """AUC of some test users with and without a private LoRA on their newest training items."""
    from benchmarks import likelihood_bench as common
    from pfm_llm.evaluation.metrics import per_user_auc
    from pfm_llm.evaluation.personality.estimates import Bootstrap, paired_difference
    from pfm_llm.likelihood.few_shot import newest_questions
    from pfm_llm.model.cohort import Parts
    from pfm_llm.protocol.types import Mode

    bench.count("likelihood_private", {"shots": 64, "users": count}, common.SEEDS[0])
    few = common.ask(bench.scorer, bench.test.held_out, count, bench.config)
    train, threshold = bench.data.split.train.interactions, bench.config.data.like_threshold
    config = common.with_settings(bench.config, dict(one.split("=") for one in common.PRIVATE))
    task = common.make_task(config, bench.data, bench.folder, bench.task.processes)
    ids = [f"user-{user}" for user in few.held_out.users]
    own = [
        newest_questions(train, int(user), threshold, common.OWN_QUESTIONS)
        for user in few.held_out.users
    ]
    trainer = task.trainer({c: task.scorer.encoder.rows(q) for c, q in zip(ids, own, strict=True)})
    shared = trained[64, common.SEEDS[0]]
    private = trainer.personalise(ids, shared)
    stacked = task.scorer.stack(shared, private, len(ids))
    modes = {Mode.SHARED_ONLY: Parts(private_weight=0.0), Mode.SHARED_PRIVATE: Parts()}
    scores = task.scorer.score(few.questions, stacked, modes)
    aucs = {mode: per_user_auc(scores[mode], few.liked) for mode in modes}
    gain = paired_difference(aucs[Mode.SHARED_PRIVATE], aucs[Mode.SHARED_ONLY], Bootstrap())
    return {
        "shots": 64,
        "steps": common.OWN_STEPS,
        "questions": common.OWN_QUESTIONS,
        "auc": {mode.value: float(np.nanmean(own)) for mode, own in aucs.items()},
        "gain_auc": dataclasses.asdict(gain),
    }


def _baselines(bench: "Bench") -> dict[tuple[str, str], np.ndarray]:
    """AUC of each test user from the central baselines, fitted on all training ratings."""
    from pfm_llm.evaluation.baselines.likes import fit_like_baselines

    texts = bench.task.parts.model.item_texts.cpu().numpy()
    fitted = fit_like_baselines(bench.data.split, bench.config.data.like_threshold, texts)
    test = bench.test
    return {(one.name, "pooled data"): one.aucs(test.held_out, test.liked) for one in fitted}


def _rows(bench: "Bench", aucs: dict[tuple[str, str], np.ndarray], seed: int) -> "list[ResultRow]":
    """Rows of the AUC of each method, and of its paired difference to the like rate."""
    from pfm_llm.evaluation import ranking
    from pfm_llm.evaluation.personality.estimates import Bootstrap, paired_difference
    from pfm_llm.evaluation.results import ResultRow
    from pfm_llm.protocol.types import Mode

    rows = []
    for (method, budget), own in aucs.items():
        is_trained = method == "likelihood" and budget != "0 shots"
        mode = Mode.SHARED_ONLY if is_trained else Mode.NONE
        mode = Mode.ZERO_SHOT if budget == "0 shots" else mode
        describe = functools.partial(
            ResultRow,
            method=method,
            mode=mode.value,
            task="like",
            protocol=bench.config.data.split.value,
            budget=budget,
            split="test",
            seed=seed,
            regime="fedsgd" if is_trained else "",
        )
        rows.append(ranking.auc_row(own, describe, bench.config.evaluation, seed))
        if method == "likelihood":
            reference = aucs["like_rate", "pooled data"]
            over = paired_difference(own, reference, Bootstrap(seed=seed))
            figures = dataclasses.asdict(over)
            rows.append(describe(candidates="full", metric="auc_over_like_rate", k=0, **figures))
    return rows


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
