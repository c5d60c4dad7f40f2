"""``pfm node``: the worker of a node."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pfm_llm.node.client import NodeClient

HELP = "Serve a node's data to a federation, which gets sums alone."

_Socket = Annotated[
    Path, typer.Argument(metavar="SOCKET", help="The node's socket.", show_default=False)
]

_Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file of the server's experiment; data.items names the public file of items.",
        show_default=False,
    ),
]
_Sockets = Annotated[
    list[str],
    typer.Argument(metavar="NAME=SOCKET...", help="Each node and its socket.", show_default=False),
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


def run(
    config: _Config,
    sockets: _Sockets,
    quorum: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of a cohort that must be in a round.")
    ] = 0.5,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="What a node has for an answer.")
    ] = 3600.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of this name from its last commit.")
    ] = False,
) -> None:
    """Train with the nodes of this machine, measure on them, and export the shared adapter.

    The workers run already (`pfm node serve`). No interaction is read here: the nodes give sums.
    """
    from pfm_llm.base.errors import ConfigError
    from pfm_llm.config.schema import load_config

    clients = _clients(sockets, timeout)
    if not 0 < quorum <= 1:
        raise ConfigError(f"--quorum {quorum:g} is no share; give one above 0, at most 1")
    experiment = load_config(config)

    from pfm_llm.evaluation.results import read_results
    from pfm_llm.evaluation.tables import terminal_table
    from pfm_llm.federation.nodes import NodesOptions
    from pfm_llm.node.link import SocketLink
    from pfm_llm.node.server_run import run_server
    from pfm_llm.runs.folders import RESULTS_FILE

    folder = run_server(experiment, SocketLink(clients), NodesOptions(quorum), resume)
    rows, _ = read_results(folder / RESULTS_FILE)
    withheld = "no figures: every node has too few users, or was away"
    table = terminal_table(rows, confidence=experiment.evaluation.confidence)
    print(f"\n{table if rows else withheld}\n\nrun folder: {folder}")


def _clients(sockets: Sequence[str], timeout: float) -> dict[str, "NodeClient"]:
    """The clients of sockets that are given as ``NAME=SOCKET``."""
    from pfm_llm.base.errors import ConfigError
    from pfm_llm.node.client import NodeClient

    found: dict[str, NodeClient] = {}
    for word in sockets:
        name, _, path = word.partition("=")
        if not name or not path or name in found or "/" in name:
            raise ConfigError(
                f"{word!r} does not name a node once with its socket; write n01=/path/to/node.sock"
            )
        found[name] = NodeClient(path, timeout)
    return found


COMMANDS: dict[str, Callable[..., None]] = {
    "serve": serve,
    "about": about,
    "forget": forget,
    "run": run,
}
