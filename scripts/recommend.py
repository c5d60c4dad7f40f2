"""Print recommendations: a run's to one of its users, or a published adapter's after a history."""

import argparse
from typing import TYPE_CHECKING

from _cli import run_safely

if TYPE_CHECKING:
    from pfm_llm.recommender import Recommendation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    run = parser.add_argument_group("a user of a run")
    run.add_argument("--user", help="the user's id in the data")
    run.add_argument("--run", default=None, help="run folder (default: the newest in runs/)")
    run.add_argument("--runs", default="runs", help="where to look for the newest run")
    pulled = parser.add_argument_group("a published adapter")
    pulled.add_argument("--adapter", help="Hub id, or a folder that was exported or pulled")
    pulled.add_argument("--history", help="item ids, oldest first, separated by commas")
    pulled.add_argument("--revision", help="commit, tag or branch")
    pulled.add_argument("--catalogue", help="file of items, when not those it was trained on")
    pulled.add_argument("--backbone", help="base model, when not as the adapter names it")
    pulled.add_argument(
        "--allow-base-mismatch", action="store_true", help="go on with other weights"
    )
    parser.add_argument("-n", type=int, default=10, help="how many items")
    parser.add_argument("--json", action="store_true", help='print {"items": [...]}')
    arguments = parser.parse_args()
    if (arguments.user is None) == (arguments.adapter is None):
        parser.error("give --user, or --adapter with --history")
    if (arguments.adapter is None) != (arguments.history is None):
        parser.error("--adapter and --history go together")
    run_safely(recommend, arguments)


def recommend(arguments: argparse.Namespace) -> None:
    import json
    import logging
    from dataclasses import asdict

    logging.getLogger().setLevel(logging.WARNING)
    items = of_run(arguments) if arguments.adapter is None else of_adapter(arguments)
    if arguments.json:
        print(json.dumps({"items": [asdict(item) for item in items]}, ensure_ascii=False))
        return
    for place, item in enumerate(items, 1):
        print(f"{place:3d}  {item.score:8.3f}  {item.title}  [{item.item_id}]")


def of_run(arguments: argparse.Namespace) -> "list[Recommendation]":
    from pathlib import Path

    from pfm_llm.runs.folders import newest_run
    from pfm_llm.serving import RunRecommender

    run = Path(arguments.run) if arguments.run else newest_run(arguments.runs)
    return RunRecommender(run).recommend(arguments.user, arguments.n)


def of_adapter(arguments: argparse.Namespace) -> "list[Recommendation]":
    import sys

    from pfm_llm.recommender import RecommenderModel

    model = RecommenderModel.from_pretrained(
        arguments.adapter,
        arguments.catalogue,
        revision=arguments.revision,
        backbone=arguments.backbone,
        allow_base_mismatch=arguments.allow_base_mismatch,
    )
    if model.alignment.num_kept < max(len(model.catalogue), model.alignment.num_known):
        print(model.alignment.describe(), file=sys.stderr)
    history = [item.strip() for item in arguments.history.split(",") if item.strip()]
    return model.recommend(history, arguments.n)


if __name__ == "__main__":
    main()
