"""``pfm host``: the agents of many users on one machine, and the list of these users."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfm_llm.cli import options
from pfm_llm.cli.agent import need_extra
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
    from pfm_llm.recommender import Recommender

HELP = "Serve the agents of many users; add, remove and list these users."
PORT = 8611

_Users = Annotated[
    Path,
    typer.Option(
        "--users", metavar="FOLDER", help="Folder of all users, with all that is kept of them."
    ),
]
_Name = Annotated[
    str, typer.Argument(help="For the operator alone; no answer tells it.", show_default=False)
]


def serve(
    users: _Users,
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    adapter: Adapter = None,
    revision: Revision = None,
    catalogue: CatalogueFile = None,
    backbone: Backbone = None,
    item_encoder: ItemEncoder = None,
    allow_base_mismatch: AllowBaseMismatch = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")
    ] = PORT,
    batch: Annotated[int, typer.Option(min=1, help="The most users in a pass.")] = 64,
    most_waiting: Annotated[
        int, typer.Option(min=1, help="How many may wait for a pass; who comes then gets 503.")
    ] = 256,
    most_open: Annotated[
        int, typer.Option(min=0, help="How many idle agents stay in memory.")
    ] = 256,
    threads: Annotated[int, typer.Option(min=1, help="Threads that a pass computes with.")] = 1,
) -> None:
    """Answer the users of a folder over HTTP, many in one pass, until SIGTERM.

    It listens on this machine's loopback; a proxy with TLS stands before it. Each request brings a
    token of `pfm host add`. /metrics needs the operator's token, which is the file "token" in the
    folder of all users.
    """
    need_extra("pfm host", "fastapi", "mcp", "prometheus_client")
    source = options.run_folder(run, runs) if adapter is None else adapter
    bases = bases_of(backbone, item_encoder, allow_base_mismatch)
    model = load(source, None, catalogue, revision, bases)
    _serve(users, model, (batch, most_waiting, most_open), port, threads)


def _serve(
    users: Path, model: "Recommender", bounds: tuple[int, int, int], port: int, threads: int
) -> None:
    import logging
    import sys

    import torch

    from pfm_llm.agent.host.service import Bounds, HostService
    from pfm_llm.agent.web.access import own_token
    from pfm_llm.agent.web.serve import serve_host

    logging.getLogger("pfm_llm").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    service = HostService(users, model, Bounds(*bounds))

    def announce(address: str) -> None:
        print(f"serving at {address}\n(SIGTERM ends it)", file=sys.stderr, flush=True)

    serve_host(service, own_token(users), port, announce)


def _there(users: Path) -> Path:
    """A folder of users that exists: a mistyped one is not made."""
    from pfm_llm.base.errors import ConfigError

    if not users.is_dir():
        raise ConfigError(f"there is no folder {users}; pfm host add makes it with its first user")
    return users


def add(name: _Name, users: _Users) -> None:
    """Add a user, and print their token, which is kept nowhere else."""
    from pfm_llm.agent.host.accounts import Accounts

    print(Accounts(users).add(name))


def remove(name: _Name, users: _Users) -> None:
    """Delete a user with all that is kept of them; their token opens nothing any more."""
    from pfm_llm.agent.host.accounts import Accounts

    Accounts(_there(users)).remove(name)
    print("removed")


def show_users(users: _Users, as_json: options.AsJson = False) -> None:
    """List the users by name."""
    import json

    from pfm_llm.agent.host.accounts import Accounts
    from pfm_llm.base.terminal import harmless

    names = sorted(account.name for account in Accounts(_there(users)).by_key().values())
    print(json.dumps(names, ensure_ascii=False) if as_json else "\n".join(map(harmless, names)))


def interactions(
    users: _Users,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="CSV file for a node.")],
) -> None:
    """Write the histories of users who let a federation learn from them, as data of a node.

    Users are random names in it. Run it anew before a node starts: who has taken their consent
    back is then left out.
    """
    from pfm_llm.agent.host.accounts import Accounts
    from pfm_llm.agent.host.contributions import write_contributions

    found = write_contributions(Accounts(_there(users)), out)
    print(
        f"{found.num_events:,} events of {found.num_contributing:,} users in {out}; "
        f"{found.num_users - found.num_contributing:,} users contribute nothing"
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "serve": serve,
    "add": add,
    "remove": remove,
    "list": show_users,
    "interactions": interactions,
}
