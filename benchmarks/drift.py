"""Replay users' timelines after the training: does an agent that goes on learning serve better?

A federation trains on all events before a time (groceries), or on the first part of each history
(games, whose events have no common clock). Then each user's later events are replayed: before each
one the catalogue is ranked, and after it the event joins the history. The prompt always shows the
newest events. Compared are

- shared: no private part;
- frozen: the private part that was read off the history at the end of the training;
- adapting: the private part read anew after each event, as an agent does.

A figure is a mean over users of their mean over events, with its interval over users; the running
ones are over the events of these numbers. Quality is minus the log of the rank (``log_rank``), and
NDCG@10.

    python benchmarks/drift.py groceries
    python benchmarks/drift.py games --set data.source=... data.items=...
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.data.history import History, Query
    from pfm_llm.evaluation.personality.estimates import Bootstrap
    from pfm_llm.recommender import Recommender

SPLITS = {
    "groceries": ["data.split=global_temporal"],
    "games": ["data.split=last_fraction", "data.held_out=0.4"],
}
WAYS = ("shared", "frozen", "adapting")
RUNNING = ((1, 5), (6, 10), (11, 20), (21, 40))
"""Numbers of the first and last event of each stretch."""
PAIRS = (("adapting", "frozen"), ("adapting", "shared"), ("frozen", "shared"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domain", choices=list(SPLITS))
    parser.add_argument("--run", type=Path, default=None, help="a run of it that is there already")
    parser.add_argument("--users", type=int, default=500, help="whose timelines are replayed")
    parser.add_argument(
        "--weight", type=float, default=None,
        help="factor on the private part (default: as validation chose it in training)",
    )  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="folder of the run")
    parser.add_argument("--out", type=Path, default=None, help="default: results/drift/DOMAIN.json")
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Train, replay, write the result and print it."""
    from benchmarks.privacy_curve import plain_config
    from pfm_llm.base import files
    from pfm_llm.base.progress import Progress
    from pfm_llm.evaluation.evaluator import sample_users
    from pfm_llm.recommender import Recommender
    from pfm_llm.runs.environment import environment_of
    from pfm_llm.runs.opening import open_run

    opened, trained = open_run(arguments.run or trained_run(arguments))
    config = opened.config
    model = Recommender.of_run(opened, trained)
    held_out = sample_users(opened.data.split.test, arguments.users, config.seed)
    replays = []
    with Progress(len(held_out.users), "replaying users", unit="users") as progress:
        for number in range(len(held_out.users)):
            replays.append(replayed(model, held_out.query(number), arguments.weight))
            progress.update()
    rows = figures(replays, config.seed)
    result = {
        "rows": rows,
        "private_weight": trained.private_weight if arguments.weight is None else arguments.weight,
        "weight_chosen": trained.private_weight,
        "config": plain_config(config) | {"users": arguments.users},
        "environment": environment_of(opened),
    }
    out = arguments.out or ROOT / "results" / "drift" / f"{arguments.domain}.json"
    files.write_json(out, result)
    for row in rows:
        interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        print(f"{row['metric']:44} {row['value']:+.4f} {interval} {row['num_users']} users")


def trained_run(arguments: argparse.Namespace) -> Path:
    """The folder of a run on the events before those that are replayed."""
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.runs.experiment import run_experiment

    sets = [
        f"name=drift-{arguments.domain}",
        f"output.dir={arguments.work}",
        "evaluation.every=0",
        "evaluation.baselines=[]",
        "evaluation.splits=[validation]",
        *SPLITS[arguments.domain],
        *arguments.overrides,
    ]
    return run_experiment(load_config(find_config(arguments.domain), sets))


def replayed(
    model: "Recommender", query: "Query", weight: float | None = None
) -> dict[str, np.ndarray]:
    """Of one user, by way the ranks [n] of their later events, at most the last of `RUNNING`."""
    from pfm_llm.recommender.serving import Served

    targets = query.targets[: RUNNING[-1][1]]
    histories = list(_timeline(query, targets))
    adapting = model.serving.fit(histories)
    served = {
        "shared": [Served(history) for history in histories],
        "frozen": [Served(history, adapting[0]) for history in histories],
        "adapting": [Served(*one) for one in zip(histories, adapting, strict=True)],
    }
    ranks = {}
    for way, users in served.items():
        scores = model.serving.scores(users, weight)
        for row, history in zip(scores, histories, strict=True):
            row[history.items] = -np.inf
        own = scores[np.arange(len(targets)), targets][:, None]
        # Ties count against the model, as in every evaluation here.
        ranks[way] = (scores >= own).sum(1)
    return ranks


def _timeline(query: "Query", targets: np.ndarray) -> Iterator["History"]:
    """The history before each target: the targets join it one after another."""
    from pfm_llm.data.history import History

    for count in range(len(targets)):
        yield History(np.concatenate([query.history.items, targets[:count]]))


def figures(replays: list[dict[str, np.ndarray]], seed: int) -> list[dict[str, Any]]:
    """The rows of the result, from the ranks of all users."""
    from pfm_llm.evaluation.personality.estimates import Bootstrap

    bootstrap = Bootstrap(seed=seed)
    rows = []
    for first, last in ((1, RUNNING[-1][1]), *RUNNING):
        stretch = [{w: r[first - 1 : last] for w, r in one.items()} for one in replays]
        stretch = [one for one in stretch if len(one[WAYS[0]])]
        if stretch:
            called = "" if (first, last) == (1, RUNNING[-1][1]) else f"_{first}_to_{last}"
            rows += _of_stretch(stretch, called, bootstrap)
    return rows


def _of_stretch(
    stretch: list[dict[str, np.ndarray]], called: str, bootstrap: "Bootstrap"
) -> list[dict[str, Any]]:
    from pfm_llm.evaluation.metrics import ndcg
    from pfm_llm.evaluation.personality.estimates import estimate, paired_difference

    measures = {"log_rank": lambda ranks: -np.log(ranks), "ndcg": lambda ranks: ndcg(ranks, 10)}
    rows = []
    for name, measure in measures.items():
        quality = {way: np.array([measure(one[way]).mean() for one in stretch]) for way in WAYS}
        found = {way: estimate(values, bootstrap) for way, values in quality.items()}
        for one, other in PAIRS:
            difference = paired_difference(quality[one], quality[other], bootstrap)
            found[f"{one}_over_{other}"] = difference
        rows += [
            {
                "metric": f"{way}_{name}{called}",
                "split": "test",
                "candidates": "full",
                **vars(value),
            }
            for way, value in found.items()
        ]
    return rows


if __name__ == "__main__":
    main()
