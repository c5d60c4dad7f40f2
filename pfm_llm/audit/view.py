"""What an observer of a round sees: messages, their sum, and what is made of the sum.

The server of an audit is the one of every run; it is tapped where a curious operator would tap it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm.audit.adapter import start_noise
from pfm_llm.base.processes import Processes
from pfm_llm.federation.masked_cohort import MaskedCohort
from pfm_llm.protocol.masks.messages import MaskedUpdate
from pfm_llm.protocol.masks.words import Words
from pfm_llm.protocol.types import ClientUpdate, SharedState, Tensors
from pfm_llm.runs.run import Run
from pfm_llm.server.aggregation import Aggregator, WeightedMean
from pfm_llm.server.masked_round import MaskedRound
from pfm_llm.server.server import Server


@dataclass(frozen=True)
class View:
    """Something that an observer sees.

    Attributes:
        tensors: Names and shapes of an update; a sum of updates, or words read as numbers.
        members: The clients whose updates are in it.
        num_examples: The stated number of examples; None where it is masked.
    """

    tensors: Tensors
    members: frozenset[str]
    num_examples: int | None


@dataclass(frozen=True)
class Seen:
    """What there is to see of a round.

    Attributes:
        messages: One for each client.
        summed: What the server has of all of them before any noise.
        released: The mean that the shared state moves by, times the cohort size.
    """

    messages: tuple[View, ...]
    summed: View
    released: View


class _TappedRound(MaskedRound):
    """A round under masks that keeps a copy of all words as they arrive."""

    def __init__(self, whole: MaskedRound, cohort: Sequence[str]) -> None:
        super().__init__(whole.session, cohort, whole.fixed_point)
        self.words: dict[str, Words] = {}

    def add(self, update: MaskedUpdate) -> None:
        """See `MaskedRound.add`."""
        self.words[update.client_id] = update.words.copy()
        super().add(update)


class TappedServer(Server):
    """A server whose operator keeps what arrives under masks.

    Attributes:
        tapped: The last round under masks; None before the first.
    """

    tapped: _TappedRound | None = None

    def new_masked_round(
        self, verify_keys: Mapping[str, bytes], nodes: Sequence[str] | None = None
    ) -> MaskedRound:
        """See `Server.new_masked_round`."""
        whole = super().new_masked_round(verify_keys, nodes)
        self.tapped = _TappedRound(whole, self.select_cohort(self.round_under_way))
        return self.tapped


def watch_round(run: Run, shared: SharedState, updates: Mapping[str, ClientUpdate]) -> Seen:
    """Let clients send their updates in one round, and look.

    Args:
        run: The experiment with its protections; its masks and noise are those of every run.
        shared: The state that the updates start from.
        updates: The update of each client of the cohort, after the stages of the client.

    Raises:
        ContractError: The updates do not fit the run.
    """
    cohort, model = len(updates), run.model
    federation = run.config.federation.model_copy(update={"cohort_size": cohort})
    clients, seed = tuple(updates), run.config.seed
    server = TappedServer(model.table, model.contract, clients, federation, seed, shared)
    received = _received(server, updates, run.processes)
    messages = [View(u.delta, frozenset({c}), u.num_examples) for c, u in updates.items()]
    if server.tapped is not None:
        words = server.tapped.words
        messages = [View(_read(server.tapped, words[c]), frozenset({c}), None) for c in words]
    assert isinstance(received, WeightedMean)  # `config_of` sets the mean
    summed = View(received.summed(), frozenset(updates), received.tally.num_examples)
    released = dataclasses.replace(summed, tensors=_released(server, received, cohort))
    return Seen(tuple(messages), summed, released)


def _received(
    server: TappedServer, sent: Mapping[str, ClientUpdate], processes: Processes
) -> Aggregator:
    if server.is_masked:
        return MaskedCohort(server, processes).train((), [tuple(sent)], lambda _: [*sent.values()])
    received = server.new_aggregator()
    for update in sent.values():
        server.receive(received, update)
    return received


def _released(server: Server, received: Aggregator, cohort: int) -> Tensors:
    privacy, round_number = server.privacy, server.round_under_way
    if privacy is None:
        mean: Tensors = received.result()
    else:
        start_noise(server)
        privacy.charge(round_number)
        mean = privacy.release(received, server.contract.tensors, round_number)
    return {name: tensor * cohort for name, tensor in mean.items()}


def _read(tapped: MaskedRound, words: Words) -> Tensors:
    """Words as the numbers that they would stand for without masks."""
    fixed_point = tapped.fixed_point
    numbers = torch.from_numpy(words[:-2].view(np.int32)).float() / fixed_point.scale
    shapes = {name: torch.Size(spec.shape) for name, spec in fixed_point.specs.items()}
    parts = numbers.split([shape.numel() for shape in shapes.values()])
    return {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
