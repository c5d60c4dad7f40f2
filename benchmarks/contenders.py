"""What the engine benchmark races: one step of every client, taken in three ways."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.sequential_peft import SequentialPeft, Step, relative_difference, stirred
from pfm_llm.base import seeding
from pfm_llm.base.errors import ConfigError, TrainingError
from pfm_llm.base.processes import Processes
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.batches import collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import make_private_part
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.protocol.types import PRIVATE_PREFIX
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import Run, assemble, load_corpus, settled
from pfm_llm.text.encoding import Window

STACKED, SAME_LAYERS, COMMON_RECIPE = "stacked_cached", "peft_same_layers", "peft_common_recipe"
_LOSS_TOLERANCE = 0.02
_GRADIENT_TOLERANCE = 0.15


@dataclass(frozen=True)
class Bench:
    """Everything that is made before the clock starts.

    Attributes:
        experiment: The experiment's objects, those of a real run.
        clients: Client ids.
        windows: Of each client its window.
        tensors: Of each client its shared and private tensors.
        wide_tensors: The same for LoRA in all layers.
        same_layers: The reference with the same adapted layers.
        common_recipe: The reference with all layers adapted.
    """

    experiment: Run
    clients: tuple[str, ...]
    windows: tuple[Window, ...]
    tensors: tuple[dict[str, torch.Tensor], ...]
    wide_tensors: tuple[dict[str, torch.Tensor], ...]
    same_layers: SequentialPeft
    common_recipe: SequentialPeft

    @classmethod
    def build(cls, config: ExperimentConfig, num_clients: int, processes: Processes) -> "Bench":
        """Load model and data, choose the clients, and set up both references.

        Raises:
            ConfigError: Fewer clients have a whole window.
        """
        folders = RunFolders.of(Path(config.output.dir) / config.name)
        data = load_corpus(config)
        config = settled(config, data)
        experiment = assemble(config, data, folders, processes)
        clients = choose_clients(experiment, num_clients)
        parts = experiment.model
        every_layer = config.adapters.model_copy(update={"num_layers": parts.backbone.num_layers})
        wide = DualAdapter(parts.backbone, every_layer)

        def reference(adapter: DualAdapter) -> SequentialPeft:
            return SequentialPeft(
                parts.backbone,
                adapter,
                parts.normaliser,
                parts.model.item_texts,
                unseen_only=config.federation.local.unseen_only,
            )

        return cls(
            experiment=experiment,
            clients=clients,
            windows=tuple(experiment.clients.histories.windows(client)[0] for client in clients),
            tensors=client_tensors(experiment, parts.adapter, clients),
            wide_tensors=client_tensors(experiment, wide, clients),
            same_layers=reference(parts.adapter),
            common_recipe=reference(wide),
        )

    def cases(self) -> dict[str, Callable[[], object]]:
        """Each case as a call that takes one step of every client."""
        return {
            STACKED: self.stacked,
            SAME_LAYERS: lambda: self.sequential(self.same_layers, self.tensors),
            COMMON_RECIPE: lambda: self.sequential(self.common_recipe, self.wide_tensors),
        }

    def fill_trunk_cache(self) -> float:
        """Compute every client's trunk states, as happens once in a run; returns the seconds."""
        started = time.perf_counter()
        for client in self.clients:
            self.experiment.clients.histories.trunk_states(client)
        return time.perf_counter() - started

    def stacked(self) -> list[Step]:
        """One step of every client in the many-clients pass, chunked as a run chunks."""
        tensors = dict(zip(self.clients, self.tensors, strict=True))
        steps: dict[str, Step] = {}
        for chunk in self.experiment.clients.trainer.chunks(self.clients):
            steps |= zip(chunk, self._stacked_chunk(chunk, tensors), strict=True)
        return [steps[client] for client in self.clients]

    def sequential(
        self, reference: SequentialPeft, tensors: Sequence[Mapping[str, torch.Tensor]]
    ) -> list[Step]:
        """One step of every client with a reference."""
        pairs = zip(self.windows, tensors, strict=True)
        return [reference.client_step(window, own) for window, own in pairs]

    def check(self) -> dict[str, float]:
        """Warm everything up, and see that the first two cases compute the same.

        Returns:
            Largest relative difference over the clients of the loss, and of all gradients
            together (Euclidean norm).

        Raises:
            TrainingError: They differ by more than the dtype's rounding explains.
        """
        self.common_recipe.client_step(self.windows[0], self.wide_tensors[0])
        pairs = list(
            zip(self.stacked(), self.sequential(self.same_layers, self.tensors), strict=True)
        )
        loss = max(abs(float(a[0] - b[0])) / abs(float(b[0])) for a, b in pairs)
        gradient = max(relative_difference(a[1], b[1]) for a, b in pairs)
        if not (loss < _LOSS_TOLERANCE and gradient < _GRADIENT_TOLERANCE):
            raise TrainingError(
                f"{STACKED} and {SAME_LAYERS} differ by {loss:.2g} in the loss and {gradient:.2g} "
                "in the gradients: a race between them would mean nothing; run the tests"
            )
        return {"loss": loss, "gradient": gradient}

    def describe(self) -> dict[str, Any]:
        """What was raced, in plain JSON types."""
        config, lengths = self.experiment.config, [len(window.tokens) for window in self.windows]
        return {
            "backbone": config.backbone.name,
            "data": config.data.source,
            "prompt": config.prompt,
            "adapters": config.adapters.model_dump(mode="json"),
            "head": config.head.model_dump(mode="json"),
            "unseen_only": config.federation.local.unseen_only,
            "blocks": self.experiment.model.backbone.num_layers,
            "items_in_catalogue": self.experiment.model.model.num_items,
            "clients": len(self.clients),
            "chunks": len(self.experiment.clients.trainer.chunks(self.clients)),
            "items_per_window": config.window.items,
            "tokens_per_window": {
                "min": min(lengths),
                "median": statistics.median(lengths),
                "max": max(lengths),
            },
        }

    def _stacked_chunk(
        self, chunk: Sequence[str], tensors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> list[Step]:
        histories, own = self.experiment.clients.histories, [tensors[client] for client in chunk]
        batch = collate(
            [histories.windows(client) for client in chunk],
            [histories.trunk_states(client) for client in chunk],
        )
        device = batch.trunk.device
        # As local training does: everybody received the same shared tensors, so no copy of them.
        leaves = {
            name: (
                torch.stack([t[name] for t in own]).to(device)
                if name.startswith(PRIVATE_PREFIX)
                else value.to(device).expand(len(chunk), *value.shape).detach()
            ).requires_grad_()
            for name, value in own[0].items()
        }
        losses = self.experiment.model.model.losses(batch, leaves, Parts())
        gradients = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
        return [
            (loss.detach(), {n: g[c] for n, g in zip(leaves, gradients, strict=True)})
            for c, loss in enumerate(losses)
        ]


def choose_clients(experiment: Run, count: int) -> tuple[str, ...]:
    """A fixed random choice among the clients whose window is full.

    Raises:
        ConfigError: There are not so many.
    """
    histories, full = experiment.clients.histories, experiment.config.window.items
    order, generator = histories.trainable, seeding.generator(experiment.config.seed, "benchmark")
    shuffled = (order[index] for index in torch.randperm(len(order), generator=generator).tolist())
    whole = [client for client in shuffled if len(histories.windows(client)[0]) == full]
    if len(whole) < count:
        raise ConfigError(
            f"--clients: {count}, but only {len(whole)} have a whole window of {full} items"
        )
    return tuple(whole[:count])


def client_tensors(
    experiment: Run, adapter: DualAdapter, clients: Sequence[str]
) -> tuple[dict[str, torch.Tensor], ...]:
    """Shared and private tensors of each client, as after some training: nothing is zero.

    Args:
        experiment: The experiment.
        adapter: Which layers are adapted.
        clients: Client ids. All share the same shared tensors.
    """
    parts, config = experiment.model, experiment.config
    sizes = Sizes(parts.backbone.hidden_size, adapter.modules, parts.model.num_items)
    initial = parameter_table(config, sizes).initial_state()
    shared = stirred(initial.tensors, config.seed, "shared")
    private = make_private_part(config, sizes)
    return tuple(
        shared | stirred(private.initial(client), config.seed, client) for client in clients
    )
