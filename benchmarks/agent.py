"""Measure a personal agent on people who are in no federation.

An adapter is trained on a part of the users of the data. Each of the other users then has an agent
with that adapter, and their own events are replayed:

- reasons: the past items that an explanation names are deleted together, and as many others of the
  history at random; ``reasons_held`` is the share of cases in which the named ones cost the
  recommended item more of its log-probability.
- less like this: before their last ten events, the user turns down the first item of their list
  that they do not choose later. ``prevented`` is the share of similar items that the next ten
  lists do not show any more; of items with the very same genres, which the rule does not look at,
  ``prevented_same_genres`` tells the same. ``ndcg_kept`` is the NDCG@10 of what they choose in
  these ten lists, as a share of that without the wish.
- forget: ``forget_bit_exact`` is the share of users whose private part, once an event is
  forgotten, is to the last bit that of somebody who never had it.
- seconds: of the first list of an agent that is loaded, and from a feedback to the next list.

    python benchmarks/agent.py
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.agent.actions import Event
    from pfm_llm.agent.agent import PersonalAgent
    from pfm_llm.agent.less import Similarity
    from pfm_llm.recommender import Recommender

LISTS, LENGTH = 10, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a shipped config, or a file")
    parser.add_argument("--train-users", type=int, default=600, help="users of the federation")
    parser.add_argument("--users", type=int, default=200, help="other users, with an agent each")
    parser.add_argument("--least", type=int, default=20, help="events before the ten that follow")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="folder of the run")
    parser.add_argument("--out", type=Path, default=None, help="default: results/agent/NAME.json")
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Train, replay, write the result and print it."""
    from pfm_llm.base import files
    from pfm_llm.base.progress import Progress
    from pfm_llm.recommender import Recommender
    from pfm_llm.runs.environment import environment

    folder, histories = trained(arguments)
    model = Recommender.from_pretrained(folder)
    found: dict[str, list[float]] = {}
    asked = histories[: arguments.users]
    with Progress(len(asked), "replaying users", unit="users") as progress:
        for history in asked:
            for name, value in replayed(model, history).items():
                found.setdefault(name, []).append(value)
            progress.update()
    rows = figures(found)
    result = {
        "rows": rows,
        "config": {
            "config": arguments.config,
            "overrides": arguments.overrides,
            "train_users": arguments.train_users,
            "least": arguments.least,
        },
        "environment": environment(
            seed=0, dtype="bfloat16", threads=threads(), num_processes=1, device="cpu"
        ),
    }
    out = arguments.out or ROOT / "results" / "agent" / f"{Path(arguments.config).stem}.json"
    files.write_json(out, result)
    for row in rows:
        low, high = row.get("ci_low"), row.get("ci_high")
        interval = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
        print(f"{row['metric']:24} {row['value']:.3f}{interval}")


SHARES = {
    "prevented": (True, "similar_with", "similar_without"),
    "prevented_same_genres": (True, "genres_with", "genres_without"),
    "ndcg_kept": (False, "ndcg_with", "ndcg_without"),
}
"""Name of a figure to whether it is what is prevented, and the two sums that it compares."""


def figures(found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The rows of the result, from the figures of all users."""
    from pfm_llm.evaluation.personality.estimates import Bootstrap, estimate

    bootstrap = Bootstrap(seed=0)
    rows: list[dict[str, Any]] = []
    for name in ("reasons_held", "forget_bit_exact"):
        rows.append({"metric": name} | vars(estimate(np.array(found[name]), bootstrap)))
    for name, (prevents, one, other) in SHARES.items():
        with_wish, without = np.array(found[one]), np.array(found[other])
        rows.append({"metric": name} | share(with_wish, without, prevents))
    for name in ("first_list_seconds", "feedback_seconds"):
        rows.append({"metric": name, "value": statistics.median(found[name])})
    return [row | {"split": "other_users", "candidates": "full"} for row in rows]


def trained(arguments: argparse.Namespace) -> tuple[Path, list[list[str]]]:
    """The folder of a run on some users, and long histories of others in a fixed order."""
    from pfm_llm.base.seeding import numpy_generator
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.runs.experiment import run_experiment
    from pfm_llm.runs.run import load_corpus

    config = find_config(arguments.config)
    sets = [
        "name=agent",
        f"output.dir={arguments.work}",
        "evaluation.every=0",
        "evaluation.baselines=[]",
        *arguments.overrides,
    ]
    everybody = load_corpus(load_config(config, sets)).interactions
    of_some = load_config(config, [*sets, f"data.max_users={arguments.train_users}"])
    taught = set(load_corpus(of_some).interactions.user_ids)
    folder = run_experiment(of_some)
    ids = everybody.catalogue.item_ids
    others = [
        [ids[item] for item in own.items]
        for number, user_id in enumerate(everybody.user_ids)
        if user_id not in taught
        and len(own := everybody.history_of(number)) >= arguments.least + LISTS
    ]
    order = numpy_generator(0, "agents of other users").permutation(len(others))
    return folder, [others[place] for place in order]


def replayed(model: "Recommender", history: Sequence[str]) -> dict[str, float]:
    """All that is measured of one user; sums of `SHARES` are over the ten lists."""
    from pfm_llm.agent.agent import PersonalAgent

    past, future = history[:-LISTS], history[-LISTS:]
    with tempfile.TemporaryDirectory() as folder:
        agent = PersonalAgent(model, Path(folder) / "me")
        agent.add_history(past)
        started = time.perf_counter()
        shown = [one.item_id for one in agent.recommend(LENGTH)]
        first = time.perf_counter() - started
        unwanted = next((item for item in shown if item not in future), shown[0])
        found = reasons_held(agent, shown[0]) | lists_with_and_without(agent, unwanted, future)
        started = time.perf_counter()
        agent.feedback(unwanted, "less_like_this")
        agent.recommend(LENGTH)
        return found | {
            "first_list_seconds": first,
            "feedback_seconds": time.perf_counter() - started,
            "forget_bit_exact": forgets(agent, model, Path(folder) / "never", past),
        }


def reasons_held(agent: "PersonalAgent", item_id: str) -> dict[str, float]:
    """Whether deleting what a sentence names costs the item more than deleting others."""
    from pfm_llm.agent.reasons import NAMED
    from pfm_llm.base.seeding import numpy_generator

    explanation = agent.explain(item_id)
    named = [reason.item_id for reason in explanation.reasons if reason.effect > 0][:NAMED]
    if not named:
        return {"reasons_held": math.nan}
    events = agent.known.counted
    others = [event.item_id for event in events if event.item_id not in named]
    generator = numpy_generator(0, f"deleted beside {item_id} {len(events)}")
    drawn = generator.choice(others, min(len(named), len(others)), replace=False).tolist()
    costs = [share_without(agent, item_id, deleted) for deleted in (named, drawn)]
    return {"reasons_held": float(costs[0] < costs[1])}


def share_without(agent: "PersonalAgent", item_id: str, deleted: Sequence[str]) -> float:
    """Log-probability of an item without some events, over what the user has not met."""
    from pfm_llm.agent.ranking import Ranking, log_shares

    known, model = agent.known, agent.model
    candidates = Ranking(model).all_but([event.item_id for event in known.events])
    events = [event for event in known.counted if event.item_id not in deleted]
    scores = Ranking(model).both(events, None).both
    (item,) = model.items([item_id]).tolist()
    return float(log_shares(scores, candidates)[item])


def lists_with_and_without(
    agent: "PersonalAgent", unwanted: str, future: Sequence[str]
) -> dict[str, float]:
    """Similar items and NDCG in the lists before each of some events, with the wish and without."""
    from pfm_llm.agent.actions import Event
    from pfm_llm.agent.less import Similarity

    model, events = agent.model, list(agent.known.counted)
    similarity = Similarity(*model.serving.item_vectors())
    (item,) = model.items([unwanted]).tolist()
    near = set(similarity.neighbours(item))
    genres = model.catalogue.fields.get("genres") or [""] * len(model.catalogue)
    same = {i for i, own in enumerate(genres) if own and own == genres[item]} - {item}
    found = dict.fromkeys([name for _, *sums in SHARES.values() for name in sums], 0.0)
    for met in future:
        (chosen,) = model.items([met]).tolist()
        for kind, top in two_lists(model, similarity, events, item).items():
            found[f"similar_{kind}"] += sum(one in near for one in top)
            found[f"genres_{kind}"] += sum(one in same for one in top)
            found[f"ndcg_{kind}"] += 1 / math.log2(2 + top.index(chosen)) if chosen in top else 0.0
        events.append(Event(met, events[-1].at + 1, None, True))
    return found


def two_lists(
    model: "Recommender", similarity: "Similarity", events: Sequence["Event"], unwanted: int
) -> dict[str, list[int]]:
    """The list after some events with the wish for less of an item, and without it."""
    from pfm_llm.agent.ranking import Ranking

    ranking = Ranking(model)
    scores = ranking.both(events, None).both
    allowed = ranking.all_but([event.item_id for event in events])
    lists = {}
    for kind, wishes in (("without", []), ("with", [unwanted])):
        lowered = similarity.lowered(scores, wishes, 1.0, allowed)
        shown = allowed.copy()
        shown[wishes] = False
        lists[kind] = np.argsort(-np.where(shown, lowered, -np.inf))[:LENGTH].tolist()
    return lists


def forgets(
    agent: "PersonalAgent", model: "Recommender", folder: Path, past: Sequence[str]
) -> float:
    """Whether forgetting the middle event gives the bits of somebody who never had it."""
    from pfm_llm.agent.agent import PersonalAgent

    gone = past[len(past) // 2]
    agent.forget(gone)
    never = PersonalAgent(model, folder)
    never.add_history([item for item in past if item != gone])
    one, other = agent.private_part(), never.private_part()
    return float(all(bool((value == other[name]).all()) for name, value in one.items()))


def share(with_wish: np.ndarray, without: np.ndarray, prevents: bool) -> dict[str, float]:
    """A ratio of sums over users with its bootstrap interval, or one less it: what is prevented."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(without), (1000, len(without)))
    totals = without[draws].sum(1)
    ratios = with_wish[draws].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    value = float(with_wish.sum() / without.sum())
    if prevents:
        value, low, high = 1 - value, 1 - high, 1 - low
    return {"value": value, "ci_low": low, "ci_high": high, "num_users": len(without)}


def threads() -> int:
    """The threads that torch uses."""
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
