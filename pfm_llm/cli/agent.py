"""``pfm agent``: a personal agent's page, or its server for an assistant."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfm_llm.cli import options
from pfm_llm.cli.recommend import Adapter, Backbone, CatalogueFile, ItemEncoder, bases_of, load

if TYPE_CHECKING:
    from pfm_llm.agent.agent import PersonalAgent
    from pfm_llm.recommender import Recommender

PORT = 8610


class Way(StrEnum):
    """How the agent is reached."""

    PAGE = "page"
    MCP = "mcp"


_Way = Annotated[
    Way,
    typer.Argument(
        help="page: a page in the browser, with an HTTP API and MCP beside it. mcp: answer the "
        "assistant that starts this command, over standard input and output."
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
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch.")] = None,
    catalogue: CatalogueFile = None,
    backbone: Backbone = None,
    item_encoder: ItemEncoder = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Go on with other weights.")
    ] = False,
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
    """
    import logging

    _check(adapter, user, folder)
    logging.getLogger("pfm_llm").setLevel(logging.WARNING)
    source = options.run_folder(run, runs) if adapter is None else adapter
    bases = bases_of(backbone, item_encoder, allow_base_mismatch)
    model = load(source, user, catalogue, revision, bases)
    _serve(model, _own(model, folder or _default_folder()), way, port, not no_browser)


def _check(adapter: str | None, user: str | None, folder: Path | None) -> None:
    from pfm_llm.base.errors import ConfigError

    if user is not None and adapter is not None:
        raise ConfigError("--user is of a run; a published adapter knows no users")
    if user is not None and folder is None:
        raise ConfigError("--user needs --folder, so that nobody else's history becomes yours")
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
