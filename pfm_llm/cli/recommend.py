"""``pfm recommend``: a run's list for one of its users, or an adapter's after a history."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfm_llm.cli import options

if TYPE_CHECKING:
    from pfm_llm.recommender import Recommendation, Recommender


def recommend(
    user: Annotated[str | None, typer.Option(help="A user's id in the data of a run.")] = None,
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    adapter: Annotated[
        str | None, typer.Option(help="Hub id, or a folder that was exported or pulled.")
    ] = None,
    history: Annotated[
        str | None,
        typer.Option(help="With --adapter: ids or titles of items, oldest first, with commas."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch.")] = None,
    catalogue: Annotated[
        str | None, typer.Option(help="File of items, when not those it was trained on.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Base model, when not as the adapter names it.")
    ] = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Go on with other weights.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="With --user: by the shared part alone, their own, and another's."
        ),
    ] = False,
    n: Annotated[int, typer.Option("-n", help="How many items.")] = 10,
    as_json: options.AsJson = False,
) -> None:
    """Recommend items to a user, or after a history.

    With --user: to a user of a run, with their private part. With --adapter and --history: by a
    published adapter.
    """
    _start(user, adapter, history, compare)
    if compare:
        return _compare(options.run_folder(run, runs), str(user), n, as_json)
    if user is not None:
        items = _of_run(options.run_folder(run, runs), user, n)
    else:
        model = _load(str(adapter), catalogue, revision, backbone, allow_base_mismatch)
        items = _after_history(model, str(history), n)
    _print(items, as_json)


def _start(user: str | None, adapter: str | None, history: str | None, compare: bool) -> None:
    import logging

    from pfm_llm.base.errors import ConfigError

    logging.getLogger("pfm_llm").setLevel(logging.WARNING)
    if (user is None) == (adapter is None):
        raise ConfigError("give --user, or --adapter with --history")
    if (adapter is None) != (history is None):
        raise ConfigError("--adapter and --history go together")
    if compare and user is None:
        raise ConfigError("--compare goes with --user")


def _of_run(run: Path, user: str, n: int) -> "list[Recommendation]":
    from pfm_llm.recommender import Recommender

    return Recommender.from_pretrained(run, user).recommend(k=n)


def _compare(run: Path, user: str, n: int, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from pfm_llm.runs.experiment import open_run
    from pfm_llm.runs.lists import compare_lists

    found = compare_lists(*open_run(run), user, n)
    print(json.dumps(asdict(found), ensure_ascii=False) if as_json else found.text())


def _load(
    adapter: str,
    catalogue: str | None,
    revision: str | None,
    backbone: str | None,
    allow_base_mismatch: bool,
) -> "Recommender":
    import sys

    from pfm_llm.recommender import Recommender

    model = Recommender.from_pretrained(
        adapter,
        catalogue=catalogue,
        revision=revision,
        backbone=backbone,
        allow_base_mismatch=allow_base_mismatch,
    )
    if model.alignment.num_kept < max(len(model.catalogue), model.alignment.num_known):
        print(model.alignment.describe(), file=sys.stderr)
    return model


def _after_history(model: "Recommender", history: str, n: int) -> "list[Recommendation]":
    import sys

    from pfm_llm.data.titles import find_items

    items = find_items(model.catalogue, history)
    titles = dict(zip(model.catalogue.item_ids, model.catalogue.fields["title"], strict=True))
    print(f"history: {'; '.join(f'{titles[i]} [{i}]' for i in items)}", file=sys.stderr)
    return model.recommend(items, n)


def _print(items: "list[Recommendation]", as_json: bool) -> None:
    import json
    from dataclasses import asdict

    if as_json:
        print(json.dumps({"items": [asdict(item) for item in items]}, ensure_ascii=False))
        return
    for place, item in enumerate(items, 1):
        print(f"{place:3d}  {item.score:8.3f}  {item.title}  [{item.item_id}]")
