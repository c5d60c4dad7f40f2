"""The server of a federation whose clients are on other machines.

It needs the catalogue of items with their texts, which is public, and no interaction of anybody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import Aggregation, Participation, SplitKind
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import settings_hash, settings_of_server
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.build import ModelParts, build_model
from pfm_llm.model.items.fitted import tensors_hash
from pfm_llm.model.start import Start
from pfm_llm.protocol.agreement import Agreement
from pfm_llm.protocol.messages import AboutRequest
from pfm_llm.server.server import Server

UNTRAINED = "untrained/"
"""Prefix of the shared tensors that nobody trains, among those that a server gives to its nodes."""


@dataclass(frozen=True)
class ServerSide:
    """What a server has before it has met any node.

    Attributes:
        config: The experiment; what follows from the number of clients may have no value yet.
        model: The model over the catalogue: table, contract, initial state, whitening and codes.
    """

    config: ExperimentConfig
    model: ModelParts

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """The tensors that all nodes must take from here; see `given_tensors`."""
        return given_tensors(self.model)

    @property
    def agreement(self) -> Agreement:
        """What each node must agree on."""
        return agreement_of(self.config, self.model, self.given)

    @property
    def dtype(self) -> str:
        """The dtype in which the backbone computes here."""
        return dtype_of(self.model)

    @property
    def invitation(self) -> AboutRequest:
        """The request that lets a node take part."""
        return AboutRequest(settings=settings_of_server(self.config), tensors=self.given)

    def new_server(self, client_ids: Sequence[str], config: ExperimentConfig) -> Server:
        """The server before round 1.

        Args:
            client_ids: The slots of all nodes.
            config: The same experiment, settled; see `settle`.
        """
        model = self.model
        return Server(
            model.table, model.contract, client_ids, config.federation, config.seed, model.shared
        )


def assemble_server(
    config: ExperimentConfig,
    catalogue: Catalogue,
    device: torch.device,
    start: Start | None = None,
) -> ServerSide:
    """The server's side of an experiment.

    It knows its initial state and its contract, and fits whitening and codes for all nodes.

    Args:
        config: The experiment; of its section ``data`` the source is not read.
        catalogue: The items, in the order of the public file that the nodes have too.
        device: The device that reads the texts of the items.
        start: A published adapter to start from; None: a new model.

    Raises:
        ConfigError: A setting needs what only one machine with all data can have.
        DataError, BackboneError, ArtefactError: See `build_model`.
    """
    if problem := _pooled_problem(config):
        raise ConfigError(f"{problem} where the clients are on other machines")
    # The server knows no rating. They only matter where a history is rendered, at its node.
    ratings = np.empty(0, np.float32)
    return ServerSide(config, build_model(config, catalogue, ratings, device, start))


def given_tensors(model: ModelParts) -> dict[str, torch.Tensor]:
    """What a server makes once and all others take: whitening, codes, tensors that stay as drawn.

    Args:
        model: The server's model.
    """
    untrained = model.table.keys() - model.contract.tensors.keys()
    kept = {f"{UNTRAINED}{name}": model.shared.tensors[name] for name in sorted(untrained)}
    return {**model.fitted.tensors, **kept}


def agreement_of(
    config: ExperimentConfig, model: ModelParts, given: Mapping[str, torch.Tensor]
) -> Agreement:
    """The hashes that both sides compute, each from what it has.

    Args:
        config: The experiment as this side has it.
        model: This side's model.
        given: The tensors that the server gave.
    """
    return Agreement(model.contract.hash(), tensors_hash(given), settings_hash(config))


def dtype_of(model: ModelParts) -> str:
    """The dtype in which the backbone of a model computes, such as ``float32``."""
    return str(model.backbone.dtype).removeprefix("torch.")


def _pooled_problem(config: ExperimentConfig) -> str | None:
    if config.data.split is SplitKind.GLOBAL_TEMPORAL:
        return (
            "data.split: global_temporal puts its cuts by the times of all users, which nobody "
            "has; use leave_last_out or last_fraction"
        )
    if config.data.met_items_only:
        return "data.met_items_only needs to know what all users met; set it to false"
    aggregator = config.federation.server.aggregator
    if aggregator is not Aggregation.MEAN:
        return f"federation.server.aggregator: {aggregator} needs single updates; set it to mean"
    privacy = config.federation.privacy
    if privacy is not None and privacy.participation is Participation.POISSON:
        return (
            "federation.privacy.participation: poisson draws a round that is repeated anew, and a "
            "node answers a round for one set of clients; set it to passes"
        )
    return None
