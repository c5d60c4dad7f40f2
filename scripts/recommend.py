"""Print what a run recommends to one of its users."""

import argparse

from _cli import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--user", required=True, help="the user's id in the data")
    parser.add_argument("--run", default=None, help="run folder (default: the newest in runs/)")
    parser.add_argument("--runs", default="runs", help="where to look for the newest run")
    parser.add_argument("-n", type=int, default=10, help="how many items")
    parser.add_argument("--json", action="store_true", help='print {"items": [...]}')
    run_safely(recommend, parser.parse_args())


def recommend(arguments: argparse.Namespace) -> None:
    import json
    import logging
    from dataclasses import asdict
    from pathlib import Path

    from pfm_llm.run_report import newest_run
    from pfm_llm.serving import RunRecommender

    logging.getLogger().setLevel(logging.WARNING)
    run = Path(arguments.run) if arguments.run else newest_run(arguments.runs)
    items = RunRecommender(run).recommend(arguments.user, arguments.n)
    if arguments.json:
        print(json.dumps({"items": [asdict(item) for item in items]}, ensure_ascii=False))
        return
    for place, item in enumerate(items, 1):
        print(f"{place:3d}  {item.score:8.3f}  {item.title}  [{item.item_id}]")


if __name__ == "__main__":
    main()
