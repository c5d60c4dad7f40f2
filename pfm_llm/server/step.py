"""The server's step: from the mean update to the next shared state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pfm_llm.base.errors import TrainingError
from pfm_llm.config.choices import LearningRateSchedule, ServerOptimizer
from pfm_llm.config.schema import ServerConfig
from pfm_llm.config.settle import known
from pfm_llm.protocol.types import SharedState, Tensors
from pfm_llm.server.aggregation import check_same_tensors

_BETA2, _EPS = 0.99, 1e-8
"""β₂ and ε of `ServerStep`'s ``fedadam``."""

_MAX_RATE = 1e30
"""A larger learning rate, divided by Adam's bias correction, may overflow float32."""


@dataclass(frozen=True)
class OptimizerState:
    """The state of the server's optimizer.

    Attributes:
        step: Number of steps taken.
        first: Momentum of ``fedavgm`` and ``fedadam``, float32, named as the shared tensors;
            empty for ``average``.
        second: Mean of squares of ``fedadam``, likewise; empty for the others.
    """

    step: int
    first: Tensors
    second: Tensors


@dataclass(frozen=True)
class ServerStep:
    """The server's optimizer: state in, state out.

    With Δ the aggregated update, η the tensor's learning rate times `lr_factor`:

    - ``average``: w ← w + η Δ. With a constant schedule and rates of 1 that is FedAvg (arXiv
      1602.05629, algorithm 1).
    - ``fedavgm``: v ← momentum · v + Δ; w ← w + η v (arXiv 1909.06335).
    - ``fedadam``: m ← momentum · m + (1 - momentum) Δ; v ← β₂ v + (1 - β₂) Δ²;
      w ← w + η m̂ / (√v̂ + ε) (arXiv 2003.00295, algorithm 2). Unlike in the paper, m̂ and v̂ have
      Adam's bias correction, so that the first rounds take full steps. With Δ = -gradient this is
      Adam.

    ``weight_decay`` is decoupled, w ← (1 - η · weight_decay) w before the step, and applies to
    every tensor.

    Attributes:
        config: Optimizer and schedule.
        num_rounds: Length of the schedule in rounds.
        rates: Learning rate of each tensor before the schedule; see `Parameter`.
    """

    config: ServerConfig
    num_rounds: int
    rates: Mapping[str, float]

    def initial_state(self, shared: SharedState) -> OptimizerState:
        """The state before the first step: zeros where the optimizer needs moments."""
        optimizer = self.config.optimizer
        return OptimizerState(
            step=0,
            first={} if optimizer is ServerOptimizer.AVERAGE else _zeros(shared.tensors),
            second=_zeros(shared.tensors) if optimizer is ServerOptimizer.FEDADAM else {},
        )

    def lr_factor(self, round_number: int) -> float:
        """The schedule's factor in (0, 1] for a round, from 1.

        It rises linearly over ``warmup_rounds``, as r / (warmup_rounds + 1). Then it is 1, or half
        a cosine from 1 that would reach 0 in the round after the last.
        """
        warmup = known(self.config.warmup_rounds)
        if round_number <= warmup:
            return round_number / (warmup + 1)
        if self.config.lr_schedule is LearningRateSchedule.CONSTANT:
            return 1.0
        progress = (round_number - 1 - warmup) / (self.num_rounds - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def step(
        self, shared: SharedState, aggregate: Tensors, state: OptimizerState
    ) -> tuple[SharedState, OptimizerState]:
        """Take one step; the arguments are not changed.

        Args:
            shared: The state that the clients started from.
            aggregate: The aggregated update, with the same names and shapes.
            state: The state of the optimizer.

        Returns:
            The next shared state and optimizer state.

        Raises:
            ContractError: ``aggregate`` does not fit ``shared``.
            TrainingError: A result is not finite.
        """
        check_same_tensors(aggregate, shared.tensors, "the aggregate")
        first, second = self._moments(aggregate, state)
        round_number = shared.round_number + 1
        factor, count = self.lr_factor(round_number), state.step + 1
        tensors = {}
        for name, tensor in shared.tensors.items():
            rate = self._rate(name, factor)
            moved = tensor * (1 - rate * self.config.weight_decay)
            if name in second:
                correction1 = 1 - self.config.momentum**count
                correction2 = 1 - _BETA2**count
                root = (second[name].sqrt() / math.sqrt(correction2)).add_(_EPS)
                moved.addcdiv_(first[name], root, value=rate / correction1)
            else:
                moved.add_(first.get(name, aggregate[name]), alpha=rate)
            tensors[name] = moved
        for results in (tensors, first, second):
            _check_finite(results, round_number)
        return SharedState(tensors, round_number), OptimizerState(count, first, second)

    def _rate(self, name: str, factor: float) -> float:
        rate = factor * self.rates[name]
        if rate > _MAX_RATE:
            raise TrainingError(
                f"the server's learning rate of {name} is {rate:g}, beyond float32; "
                "lower the learning rates in federation.server"
            )
        return rate

    def _moments(
        self, aggregate: Tensors, state: OptimizerState
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        momentum = self.config.momentum
        gain = 1 - momentum if self.config.optimizer is ServerOptimizer.FEDADAM else 1.0
        first = {
            name: (moment * momentum).add_(aggregate[name], alpha=gain)
            for name, moment in state.first.items()
        }
        second = {
            name: (moment * _BETA2).addcmul_(aggregate[name], aggregate[name], value=1 - _BETA2)
            for name, moment in state.second.items()
        }
        return first, second


def _zeros(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _check_finite(tensors: Tensors, round_number: int) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"the server's step of round {round_number} made {name} not finite; "
                "lower the learning rates in federation.server"
            )
