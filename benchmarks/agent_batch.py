"""Race the ranking of many users, each with a private part, against PEFT's mixed batch.

All cases rank the whole catalogue for the same users after the same histories:

- stacked: one pass of `StackedServing`, as a host serves its users after something new;
- stacked_kept: the same once a pass has read the histories, as a host ranks with another weight, or
  with the private part after the shared one: all but one token of one layer is kept;
- peft: PEFT's mixed batch, one adapter a user, the shared adapter merged into the weights;
- peft_joined: the same with shared and private adapter joined to one a user;
- peft_last_mlp: peft, with the last MLP on the tokens alone that are read out, as in stacked;
- stacked_with_fit: stacked, and before it the private part of each user from the history;
- one_by_one: stacked with a pass for each user.

They have the same inputs (the states of the items, which are read once for a catalogue and kept),
the same layers and the same head, which is checked: their scores are the same but for rounding. But
for stacked_kept they do the same work.
Left out on all sides: loading the model, and reading the texts of the catalogue. Left out of all
cases but stacked_with_fit: the private parts, which PEFT loads as adapters and a host reads off
histories; ``costs`` has the seconds of both. Laps alternate between the cases, so that whatever
else the machine does hits all alike; the ratios are those within a lap.

    python benchmarks/agent_batch.py runs/quickstart
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from benchmarks.mixed_batch import MixedBatch
    from pfm_llm.data.history import History
    from pfm_llm.model.build import ModelParts
    from pfm_llm.recommender.serving import Served
    from pfm_llm.runs.run import Run, Trained

FIRST, KEPT = "stacked", "stacked_kept"
UNIT = "users_per_s"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""By dtype, how far scores may be from those of stacked: the norm of the difference to that of the
scores. Bfloat16 keeps eight bits, and merged weights round elsewhere than added terms."""
Case = Callable[[], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run whose private part is a hyper_lora")
    parser.add_argument("--users", type=int, default=64, help="in a batch")
    parser.add_argument("--laps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of users")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "agent" / "batch.json")
    arguments = parser.parse_args()
    if min(arguments.users, arguments.laps, arguments.threads) < 1:
        parser.error("--users, --laps and --threads must be at least 1")
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Open the run, check, race, write the result and print it."""
    import torch

    from benchmarks.engine import table
    from pfm_llm.base import files
    from pfm_llm.runs.environment import environment_of
    from pfm_llm.runs.opening import open_to_serve

    opened, trained, _ = open_to_serve(arguments.run)
    torch.set_num_threads(arguments.threads)
    histories = some_histories(opened, arguments.users, arguments.seed)
    result = measured(opened.model, trained, histories, arguments.laps) | {
        "config": opened.config.model_dump(mode="json", exclude={"output", "cache"}),
        "settings": {
            "users": arguments.users,
            "laps": arguments.laps,
            "events": [len(history) for history in histories],
        },
        "environment": environment_of(opened)
        | {"seed": arguments.seed, "threads": torch.get_num_threads()},
    }
    files.write_json(arguments.out, result)
    print(table({"rows": result["cases"], "ratios": {}}, UNIT))
    for row in result["rows"]:
        print(f"{row['metric']:30} {row['value']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]")


def some_histories(opened: "Run", count: int, seed: int) -> list["History"]:
    """The whole histories of users of a run, in a fixed random order.

    Raises:
        ConfigError: There are not so many users.
    """
    from pfm_llm.base.errors import ConfigError
    from pfm_llm.base.seeding import numpy_generator

    interactions = opened.data.interactions
    if interactions.num_users < count:
        raise ConfigError(f"--users {count}, but the run has {interactions.num_users}")
    order = numpy_generator(seed, "users of a batch").permutation(interactions.num_users)
    return [interactions.history_of(int(number)) for number in order[:count]]


def measured(
    parts: "ModelParts", trained: "Trained", histories: Sequence["History"], laps: int
) -> dict[str, Any]:
    """Rows, cases, agreement and costs.

    Args:
        parts: The model.
        trained: Its shared state, and the weight of private parts.
        histories: Of each user.
        laps: How often each case is timed.

    Raises:
        TrainingError: The cases do not give the same scores.
    """
    from benchmarks.engine import race
    from benchmarks.engine import rows as rates

    cases, costs = cases_of(parts, trained, histories)
    agreement = agreed(cases, str(parts.backbone.dtype).removeprefix("torch."))
    seconds = race(cases, laps)  # each has run once, for the agreement
    return {
        "rows": [
            {"metric": f"{first}_over_{name}", "split": "users", "candidates": "full"} | ratio
            for first in (FIRST, KEPT)
            for name, ratio in ratios(seconds, first).items()
        ],
        "cases": [row | {"unit": UNIT} for row in rates(seconds, len(histories))],
        "agreement": agreement,
        "costs": costs,
    }


def cases_of(
    parts: "ModelParts", trained: "Trained", histories: Sequence["History"]
) -> tuple[dict[str, Case], dict[str, float]]:
    """What is raced, and the seconds a user of getting a private part ready."""
    from benchmarks.mixed_batch import MixedBatch, loaded
    from pfm_llm.model.private.last_layer import LastTokens
    from pfm_llm.recommender.serving import Served, StackedServing

    serving = StackedServing(parts, trained)
    serving.fit(histories[:1])  # what the first call makes once is not timed
    started = time.perf_counter()
    private = serving.fit(histories)
    costs = {"fit_seconds_per_user": (time.perf_counter() - started) / len(histories)}
    users = [Served(*one) for one in zip(histories, private, strict=True)]

    def with_fit() -> np.ndarray:
        fitted = zip(histories, serving.fit(histories), strict=True)
        return serving.scores([Served(*one) for one in fitted])

    kept = [dataclasses.replace(user, kept=LastTokens()) for user in users]
    cases: dict[str, Case] = {
        FIRST: lambda: serving.scores(users),
        KEPT: lambda: serving.scores(kept),
    }
    for name, merges_shared in (("peft", True), ("peft_joined", False)):
        model = loaded(parts, trained, private, merges_shared)
        costs[f"{name}_load_seconds_per_user"] = model.seconds_per_user
        cases[name] = _ranking(parts, trained, MixedBatch(parts, model, False), users)
        if merges_shared:
            layers = MixedBatch(parts, model, True)
            cases["peft_last_mlp"] = _ranking(parts, trained, layers, users)
    cases["stacked_with_fit"] = with_fit
    cases["one_by_one"] = lambda: np.concatenate([serving.scores([user]) for user in users])
    return cases, costs


def _ranking(
    parts: "ModelParts", trained: "Trained", layers: "MixedBatch", users: Sequence["Served"]
) -> Case:
    from benchmarks.mixed_batch import serving_with

    serving = serving_with(parts, trained, layers)
    return lambda: serving.scores(users)


def agreed(cases: Mapping[str, Case], dtype: str) -> dict[str, dict[str, float]]:
    """How far the scores of each case are from those of the first, and the tops that they share.

    Raises:
        TrainingError: They are further than rounding explains.
    """
    from pfm_llm.base.errors import TrainingError

    expected, found = cases[FIRST](), {}
    for name, case in cases.items():
        case()  # what is kept is kept from here on
        scores = case()
        distance = float(np.linalg.norm(scores - expected) / np.linalg.norm(expected))
        if not distance <= TOLERANCE[dtype]:
            raise TrainingError(f"{name} does not give the scores of {FIRST}: {distance:.3g} away")
        tops = [np.argsort(-one, axis=1)[:, :10] for one in (scores, expected)]
        shared = [len(np.intersect1d(*pair)) / 10 for pair in zip(*tops, strict=True)]
        found[name] = {"relative_difference": distance, "shared_top_10": statistics.mean(shared)}
    return found


def ratios(seconds: Mapping[str, Sequence[float]], first: str) -> dict[str, dict[str, float]]:
    """How many times as fast a case is as each that does not belong to `FIRST` and `KEPT`.

    It is the median over laps, with its 95 % bootstrap interval.
    """
    generator = np.random.default_rng(0)
    found = {}
    for name, times in seconds.items():
        if name in (FIRST, KEPT):
            continue
        each = np.array(times) / np.array(seconds[first])
        draws = generator.integers(0, len(each), (2000, len(each)))
        low, high = np.quantile(np.median(each[draws], axis=1), [0.025, 0.975]).tolist()
        found[name] = {"value": float(np.median(each)), "ci_low": low, "ci_high": high}
    return found


if __name__ == "__main__":
    main()
