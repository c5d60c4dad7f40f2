"""What a node has for one federation: its model, its clients, and what it was asked."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pfm_llm.base.errors import (
    ArtefactError,
    AssetError,
    BackboneError,
    ConfigError,
    DataError,
    NodeRefused,
)
from pfm_llm.base.files import make_private_dir
from pfm_llm.base.processes import Processes
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import settings_hash, with_setting
from pfm_llm.federation.server_side import UNTRAINED, agreement_of
from pfm_llm.model.items.fitted import FittedTexts, tensors_hash
from pfm_llm.node.site import SiteConfig, node_config
from pfm_llm.node.slots import AskedRounds, Left, Slots
from pfm_llm.protocol.agreement import Agreement
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.messages import AboutRequest
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.transport import as_received
from pfm_llm.protocol.types import SharedState, Tensors
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import Run, assemble, load_corpus, make_trainer

_log = logging.getLogger(__name__)
_FEDERATIONS = "federations"


@dataclass
class Membership:
    """A federation, at this node.

    Attributes:
        config: The server's settings and the site's.
        run: Data, model and clients.
        agreement: The hashes as this node has them.
        untrained: The shared tensors that the server gave and nobody trains.
        slots: The secret order of the clients.
        asked: Which slots each round asked for.
    """

    config: ExperimentConfig
    run: Run
    agreement: Agreement
    untrained: Tensors
    slots: Slots
    asked: AskedRounds
    _trainer: tuple[int, LocalTrainer] | None = None

    def trainer(self, cohort_size: int) -> LocalTrainer:
        """Local training, where a round has so many clients over all nodes."""
        if self._trainer is None or self._trainer[0] != cohort_size:
            config = with_setting(self.config, "federation.cohort_size", cohort_size)
            clients = self.run.clients
            trainer = make_trainer(config, self.run.model, clients.histories, clients.store)
            self._trainer = cohort_size, trainer
        return self._trainer[1]

    def shared(self, tensors: Tensors, round_number: int) -> SharedState:
        """The shared state of a request.

        Args:
            tensors: Those of the contract, as they are sent.
            round_number: The last round that it includes.

        Raises:
            NodeRefused: They are not those of the contract.
        """
        specs = self.run.model.contract.tensors
        if {name: TensorSpec.of(tensor) for name, tensor in tensors.items()} != specs:
            raise NodeRefused(NodeRefusal.MALFORMED, "the shared tensors break the contract")
        found = {**self.untrained, **as_received(tensors)}
        return SharedState({name: found[name] for name in self.run.model.table}, round_number)

    def num_users(self, client_ids: Sequence[str]) -> int:
        """How many users some clients are."""
        clients = self.run.clients.histories.clients
        return sum(len(clients[client_id].users) for client_id in client_ids)


def federations(site: SiteConfig) -> list[Path]:
    """The folders of all federations that the node has taken part in."""
    return sorted(path for path in (site.root / _FEDERATIONS).glob("*") if path.is_dir())


def join(site: SiteConfig, request: AboutRequest, processes: Processes, left: Left) -> Membership:
    """Take part in a federation: read the data, and build the model that the server describes.

    Args:
        site: The node's own settings.
        request: The server's settings, and the tensors that it gives.
        processes: This process.
        left: The clients that take part in nothing.

    Raises:
        NodeRefused: The settings are wrong or not allowed; or data or model do not fit them.
        StorageError: The node's folder cannot be read or written.
    """
    config = node_config(site, request.settings or {})
    try:
        data = load_corpus(config)
    except (DataError, ConfigError, AssetError) as error:
        raise NodeRefused(NodeRefusal.DATA, str(error)) from error
    _log.info("data: %s", data.report.describe())
    folder = make_private_dir(_folder(site, config, request.tensors))
    try:
        fitted = FittedTexts.from_tensors(request.tensors)
        run = assemble(config, data, RunFolders(folder, folder), processes, fitted=fitted)
    except (DataError, ConfigError, AssetError, BackboneError, ArtefactError) as error:
        raise NodeRefused(NodeRefusal.MODEL, str(error)) from error
    present = [c for c in run.clients.histories.trainable if c not in left]
    return Membership(
        config=config,
        run=run,
        agreement=agreement_of(config, run.model, request.tensors),
        untrained=_untrained(run, request.tensors),
        slots=Slots(folder, present),
        asked=AskedRounds(folder),
    )


def _folder(site: SiteConfig, config: ExperimentConfig, given: Tensors) -> Path:
    """The folder of a federation: another model must not find the private parts of this one."""
    text = f"{settings_hash(config)}/{tensors_hash(given)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return site.root / _FEDERATIONS / f"{config.name}-{digest}"


def _untrained(run: Run, given: Tensors) -> dict[str, torch.Tensor]:
    """The shared tensors among the given ones: all that are not in the contract."""
    names = run.model.table.keys() - run.model.contract.tensors.keys()
    found = {n.removeprefix(UNTRAINED): t for n, t in given.items() if n.startswith(UNTRAINED)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in found.items()}
    if specs != {name: run.model.table.specs[name] for name in names}:
        raise NodeRefused(NodeRefusal.MODEL, "the given tensors are not those that nobody trains")
    return found
