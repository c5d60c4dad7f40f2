"""``pfm recommend``: a list for a user of a run, or after a history."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfm_llm.cli import options

if TYPE_CHECKING:
    from pfm_llm.publish.serving import Bases
    from pfm_llm.recommender import Recommendation, Recommender


_History = Annotated[
    str | None,
    typer.Option(
        help="Instead of --user: ids or titles of items, oldest first, with commas; typos in "
        "titles are forgiven. An empty one is that of somebody of whom nothing is known."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="Instead of --run: a Hub id, or a folder that was exported or pulled."),
]
CatalogueFile = Annotated[
    str | None, typer.Option(help="File of items, when not those it was trained on.")
]
Backbone = Annotated[str | None, typer.Option(help="Base model, when not as the adapter names it.")]
ItemEncoder = Annotated[
    str | None, typer.Option(help="Encoder of item texts, when not as the adapter names it.")
]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch.")]
AllowBaseMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Go on with other weights.")
]
_Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Lists side by side: by the shared part alone, with the user's private part, and "
        "with another user's. Without --user: of three example users, who are not named.",
    ),
]


_NewShare = Annotated[
    float | None,
    typer.Option(
        min=0, max=1,
        help="Share of the places that items have at least which nobody in the federation has "
        "met; 0: none of their own. Default: their share of the candidates, rounded down.",
    ),
]  # fmt: skip


_ExportPrivate = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write the user's private LoRA to a folder of PEFT's format, for its owner alone.",
    ),
]


def recommend(
    user: Annotated[str | None, typer.Option(help="A user's id in the data of the run.")] = None,
    history: _History = None,
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    adapter: Adapter = None,
    revision: Revision = None,
    catalogue: CatalogueFile = None,
    backbone: Backbone = None,
    item_encoder: ItemEncoder = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    compare: _Compare = False,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="How many items; 10, or 5 with --compare.")
    ] = None,
    new_share: _NewShare = None,
    export_private: _ExportPrivate = None,
    as_json: options.AsJson = False,
) -> None:
    """Recommend items to a user of a run, or after a history.

    A user gets their private part. After a history the shared part recommends, that of a run or
    of a published adapter.
    """
    import logging

    _check(user, history, adapter, compare, export_private)
    logging.getLogger("pfm_llm").setLevel(logging.WARNING)
    if compare:
        return _compare(options.run_folder(run, runs), user, n, new_share, as_json)
    source = options.run_folder(run, runs) if adapter is None else adapter
    bases = bases_of(backbone, item_encoder, allow_base_mismatch)
    model = load(source, user, catalogue, revision, bases)
    if export_private is not None:
        model.export_private(export_private)
    items = None if history is None else _understood(model, history)
    _print(model.recommend(items, n or 10, new_share=new_share), as_json)


def _check(
    user: str | None, history: str | None, adapter: str | None, compare: bool, export: Path | None
) -> None:
    from pfm_llm.base.errors import ConfigError

    if compare and (history is not None or adapter is not None):
        raise ConfigError(
            "--compare is for users of a run: give it without --history and --adapter"
        )
    if adapter is not None and history is None:
        raise ConfigError("--adapter needs --history: a published adapter knows no users")
    if not compare and (user is None) == (history is None):
        raise ConfigError("give --user, or --history, or --compare")
    if export is not None and (user is None or compare):
        raise ConfigError("--export-private writes the private LoRA of --user; give one")


def _compare(
    folder: Path, user: str | None, n: int | None, new_share: float | None, as_json: bool
) -> None:
    import dataclasses
    import json

    from pfm_llm.runs import lists
    from pfm_llm.runs.opening import open_to_serve

    run, trained, alignment = open_to_serve(folder)
    shown = n or lists.LENGTH, new_share, alignment
    if user is not None:
        found = [lists.compare_lists(run, trained, user, *shown)]
    else:
        named = lists.compare_examples(run, trained, *shown)
        found = [dataclasses.replace(one, user="", newest=()) for one in named]
    if as_json:
        print(json.dumps(lists.lists_tree(found), ensure_ascii=False, indent=2))
    else:
        print("\n\n".join(one.text() for one in found), lists.MARK, sep="\n\n")


def bases_of(backbone: str | None, item_encoder: str | None, allow_base_mismatch: bool) -> "Bases":
    """The options of the frozen models, as the recommender takes them."""
    return {
        "backbone": backbone,
        "item_encoder": item_encoder,
        "allow_base_mismatch": allow_base_mismatch,
    }


def load(
    source: str | Path,
    user: str | None,
    catalogue: str | None,
    revision: str | None,
    bases: "Bases",
) -> "Recommender":
    """The recommender of a run or an adapter; says which items it does not know from training."""
    import sys

    from pfm_llm.recommender import Recommender

    model = Recommender.from_pretrained(source, user, catalogue, revision=revision, **bases)
    if model.alignment.num_kept < max(len(model.catalogue), model.alignment.num_known):
        print(model.alignment.describe(), file=sys.stderr)
    return model


def _understood(model: "Recommender", history: str) -> list[str]:
    import sys

    from pfm_llm.base.terminal import harmless
    from pfm_llm.data.titles import find_items

    items = find_items(history, model.catalogue)
    titles = dict(zip(model.catalogue.item_ids, model.catalogue.fields["title"], strict=True))
    named = "; ".join(f"{titles[item]} [{item}]" for item in items)
    print(f"history: {harmless(named) or 'empty'}", file=sys.stderr)
    return items


def _print(items: "list[Recommendation]", as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from pfm_llm.base.terminal import harmless

    if as_json:
        print(json.dumps({"items": [asdict(item) for item in items]}, ensure_ascii=False))
        return
    for place, item in enumerate(items, 1):
        print(f"{place:3d}  {item.score:8.3f}  {harmless(item.title)}  [{harmless(item.item_id)}]")
