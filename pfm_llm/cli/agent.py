"""``pfm agent``: a personal agent's page, its server for an assistant, and its newer adapters."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfm_llm.cli import options
from pfm_llm.cli.recommend import (
    Adapter,
    AllowBaseMismatch,
    Backbone,
    CatalogueFile,
    ItemEncoder,
    Revision,
    bases_of,
    load,
)

if TYPE_CHECKING:
    from pfm_llm.agent.agent import PersonalAgent
    from pfm_llm.publish.serving import Bases
    from pfm_llm.recommender import Recommender

PORT = 8610


class Way(StrEnum):
    """What the command does: two ways to reach the agent, and one to renew it."""

    PAGE = "page"
    MCP = "mcp"
    SYNC = "sync"


_Way = Annotated[
    Way,
    typer.Argument(
        help="page: a page in the browser, with an HTTP API and MCP beside it. mcp: answer the "
        "assistant that starts this command, over standard input and output. sync: fetch the "
        "newest of --adapter, and use it from now on if it serves your own past no worse."
    ),
]
_User = Annotated[
    str | None,
    typer.Option(
        help="A user of the run, whose history is the beginning; needs --folder. An agent that "
        "has a history keeps its own."
    ),
]
_Folder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="All that the agent knows; default: pfm_llm/agent in $XDG_DATA_HOME, which is "
        "~/.local/share where it is not set.",
    ),
]


def agent(
    way: _Way = Way.PAGE,
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    adapter: Adapter = None,
    revision: Revision = None,
    catalogue: CatalogueFile = None,
    backbone: Backbone = None,
    item_encoder: ItemEncoder = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    user: _User = None,
    folder: _Folder = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")
    ] = PORT,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address, and open nothing.")
    ] = False,
) -> None:
    """Recommend for one person, with reasons, under their control.

    It answers on this machine alone, to whoever brings the token of its folder, and sends nothing.
    Without --run and --adapter it uses the adapter that the last sync has kept, or the newest run.
    """
    import logging

    _check(way, adapter, user, folder)
    logging.getLogger("pfm_llm").setLevel(logging.WARNING)
    bases = bases_of(backbone, item_encoder, allow_base_mismatch)
    home = folder or _default_folder()
    kept = _kept(home) if run is None and (adapter is None or way is Way.SYNC) else None
    if kept is None:
        source = options.run_folder(run, runs) if adapter is None else adapter
        model = load(source, user, catalogue, revision, bases)
    else:
        model = load(kept, user, catalogue, None, bases)
    own = _own(model, home)
    if way is Way.SYNC and adapter is not None:
        return _sync(own, adapter, revision, bases)
    _serve(model, own, way, port, not no_browser)


def _kept(folder: Path) -> Path | None:
    """The adapter that the last sync of an agent has kept."""
    from pfm_llm.agent.folder import AgentFolder

    found = AgentFolder(folder).adapters() if folder.is_dir() else []
    return found[0] if found else None


def _sync(agent: "PersonalAgent", adapter: str, revision: str | None, bases: "Bases") -> None:
    found = agent.sync(adapter, revision, **bases)
    if found.difference is None:
        print("in use now; your history is too short to tell whether it serves you better")
        return
    print(
        f"{'in use now' if found.is_no_worse else 'not used: it serves your past worse'}; "
        f"{found.difference:+.3f} ± {found.error:.3f} log-probability for each of the "
        f"{found.num_events} newest events, beside the adapter before"
    )


def _check(way: Way, adapter: str | None, user: str | None, folder: Path | None) -> None:
    from pfm_llm.base.errors import ConfigError

    if way is Way.SYNC and adapter is None:
        raise ConfigError("pfm agent sync needs --adapter: a folder, or user/name on the Hub")
    if user is not None and adapter is not None:
        raise ConfigError("--user is of a run; a published adapter knows no users")
    if user is not None and folder is None:
        raise ConfigError("--user needs --folder, so that nobody else's history becomes yours")
    if way is not Way.SYNC:
        need_extra("pfm agent", "fastapi", "mcp")


def need_extra(command: str, *libraries: str) -> None:
    """Check that the libraries of the extra are there.

    Raises:
        ConfigError: One is missing.
    """
    import importlib.util

    from pfm_llm.base.errors import ConfigError

    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{command} needs {' and '.join(missing)}: "
            "pip install -c constraints-agent.txt 'pfm-llm[agent]'"
        )


def _default_folder() -> Path:
    import os

    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(base).absolute() / "pfm_llm" / "agent"


def _own(model: "Recommender", folder: Path) -> "PersonalAgent":
    """The agent of a folder; it begins with the history of the model's user, if there is one."""
    from pfm_llm.agent.agent import PersonalAgent

    found = PersonalAgent(model, folder)
    if model.owner is not None and not found.history():
        history, item_ids = model.owner.history, model.catalogue.item_ids
        ratings = None if history.ratings is None else history.ratings.tolist()
        found.add_history([item_ids[item] for item in history.items], ratings=ratings)
    return found


def _serve(
    model: "Recommender", agent: "PersonalAgent", way: Way, port: int, opens_browser: bool
) -> None:
    import sys

    import torch

    from pfm_llm.agent.web.desk import Desk, ItemIndex
    from pfm_llm.agent.web.serve import serve_assistant, serve_page

    # One user's passes are small. On a machine that does more, a second thread may cost seconds.
    torch.set_num_threads(1)
    desk = Desk(agent, ItemIndex(model.catalogue))
    if way is Way.MCP:
        return serve_assistant(desk)

    def announce(address: str) -> None:
        print(f"your agent: {address}\n(Ctrl-C ends it)", file=sys.stderr, flush=True)

    serve_page(desk, port, opens_browser, announce)
