"""``pfm node``: the worker of a node."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

HELP = "Serve a node's data to a federation, which gets sums alone."

_Socket = Annotated[
    Path, typer.Argument(metavar="SOCKET", help="The node's socket.", show_default=False)
]


def serve(
    site: Annotated[
        Path,
        typer.Argument(
            metavar="SITE", help="What the node's owner decides (YAML).", show_default=False
        ),
    ],
) -> None:
    """Answer the calls of a federation's engine, until SIGTERM or Ctrl-C.

    Everything that is private stays in the folder that SITE names.
    """
    import os

    from pfm_llm.base.processes import start_processes
    from pfm_llm.node.serve import Stop
    from pfm_llm.node.serve import serve as serve_socket
    from pfm_llm.node.site import load_site
    from pfm_llm.node.worker import Worker

    found = load_site(site)
    # Parsed interactions are kept in the user's cache, which must be as private as the node.
    os.environ.setdefault("PFM_LLM_CACHE", str(found.root / "cache"))
    stop = Stop()
    with stop.on_signals():
        serve_socket(Worker(found, start_processes(found.threads)), found, stop)


def about(socket: _Socket) -> None:
    """Print what a node tells of itself, as JSON."""
    from pfm_llm.node.client import NodeClient

    header, _ = NodeClient(socket, timeout=60.0).call("about")
    print(json.dumps(json.loads(header), indent=2))


def forget(
    socket: _Socket,
    user: Annotated[
        str,
        typer.Argument(metavar="USER", help="The id in the node's data.", show_default=False),
    ],
) -> None:
    """Delete all that a node has made of a user, and train that user no more.

    Run it as the user who runs the worker, or as root. The user's rows in the node's data are
    yours to delete.
    """
    from pfm_llm.node.client import NodeClient

    NodeClient(socket, timeout=600.0).call("forget", json.dumps({"user": user}).encode())
    print("nothing of such a user is left at the node, besides the rows of its data")


COMMANDS: dict[str, Callable[..., None]] = {"serve": serve, "about": about, "forget": forget}
