"""The ServerApp: a run over Flower's nodes, as `flwr run` describes it.

Keys of the run's config, ``flwr run -c 'config="…" nodes="n01 n02"'``::

    config   the experiment's YAML file on the server; data.items is the public file of items
    nodes    the names with which the SuperNodes were registered
    timeout  seconds that a node has for an answer
    wait     seconds to wait for all nodes at the start
    quorum   share of a cohort that must be in a round
    resume   whether to go on from the last commit
"""

from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import Field

from pfm_llm.base.errors import ConfigError
from pfm_llm.cli.start import prepare
from pfm_llm.config.model import Settings
from pfm_llm.config.schema import load_config
from pfm_llm.config.text import validated
from pfm_llm.federation.nodes import NodesOptions
from pfm_llm.flower.link import FlowerLink
from pfm_llm.node.server_run import run_server

app = ServerApp()


class RunOptions(Settings):
    """The run's config; see the module."""

    config: str
    nodes: str
    timeout: float = Field(gt=0)
    wait: float = Field(ge=0)
    quorum: float = Field(gt=0, le=1)
    resume: bool

    @property
    def names(self) -> list[str]:
        """The names of the nodes, in the order given.

        Raises:
            ConfigError: There is none, or one comes twice.
        """
        found = self.nodes.replace(",", " ").split()
        if not found or len(set(found)) < len(found):
            raise ConfigError(f"nodes: {self.nodes!r} does not name each node once")
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with the nodes, measure on them, and export the shared adapter.

    Raises:
        PfmError: Any error with a clear message; committed rounds are intact.
    """
    prepare()
    tree: dict[str, Any] = dict(context.run_config)
    options = validated(tree, RunOptions, "the run's config")
    link = FlowerLink(grid, options.names, options.timeout)
    config = load_config(options.config)
    link.wait(options.wait)
    run_server(config, link, NodesOptions(options.quorum), options.resume)
