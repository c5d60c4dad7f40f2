"""The server selects cohorts, checks and aggregates updates, and steps. It has no private state."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch

from pfm_llm.base.errors import CheckpointError, ContractError
from pfm_llm.config.choices import Weighting
from pfm_llm.config.schema import FederationConfig
from pfm_llm.config.settle import known
from pfm_llm.protocol.contract import UpdateContract, first_difference, specs_of
from pfm_llm.protocol.masks.words import MaskedSum
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.stages import Stages
from pfm_llm.protocol.transport import as_received, broadcast
from pfm_llm.protocol.types import (
    ClientUpdate,
    NodeUpdate,
    Refusal,
    SharedState,
    Tensors,
    euclidean_norm,
)
from pfm_llm.server.aggregation import Aggregator, WeightedMean, update_weight
from pfm_llm.server.masked_round import (
    MaskedRound,
    mask_rounding,
    new_fixed_point,
    new_session,
)
from pfm_llm.server.norm_bound import NormBound
from pfm_llm.server.participation import select_cohort, simulated_dropouts
from pfm_llm.server.privacy.mechanism import PrivateMean
from pfm_llm.server.robust import AGGREGATORS
from pfm_llm.server.round_summary import RoundSummary
from pfm_llm.server.state_names import PREFIXES, behind
from pfm_llm.server.step import OptimizerState, ServerStep

_LOG = logging.getLogger(__name__)
_STEP = "optimizer/step"
_SIZES = "norm_bound/sizes"
_RELEASES = "privacy/releases"


class Server:
    """Holds the shared state from round to round.

    Attributes:
        table: The shared tensors.
        contract: The contract of updates.
        privacy: Puts noise on the mean of a round; None: there is none.
    """

    def __init__(
        self,
        table: ParameterTable,
        contract: UpdateContract,
        client_ids: Sequence[str],
        config: FederationConfig,
        seed: int,
        shared: SharedState | None = None,
    ) -> None:
        """Start before round 1.

        Args:
            table: The shared tensors. Tensors that are not sent are not trained and never change.
            contract: The contract of updates, from the same table.
            client_ids: All clients.
            config: Cohort size, number of rounds, optimizer.
            seed: The experiment's seed, for the cohorts.
            shared: The shared state to start from; None: the initial state of the table.

        Raises:
            ContractError: The contract or the shared state does not fit the table.
            ConfigError: A stage cannot do its work under masks, or δ is too large for the clients.
        """
        if difference := first_difference(contract.tensors, table.sent):
            raise ContractError(
                f"the contract does not fit the table of shared tensors: {difference}; "
                "make it with ParameterTable.contract"
            )
        self._shared = table.initial_state() if shared is None else shared
        if difference := first_difference(specs_of(self._shared.tensors), table.specs):
            raise ContractError(
                "the shared state to start from does not fit the table of shared tensors: "
                f"{difference}; start from a state with the same settings"
            )
        self.table = table
        self.contract = contract
        self._client_ids = tuple(client_ids)
        self._config = config
        self._seed = seed
        rates = {name: parameter.rate for name, parameter in table.items()}
        self._step = ServerStep(config.server, known(config.num_rounds), rates)
        self._optimizer = self._step.initial_state(self._trained())
        stages = [stage.choice for stage in config.stages]
        self._stages = Stages(stages, seed, known(config.cohort_size))
        if config.masks is not None:
            self._stages.check_masked()
        self._bound = NormBound(contract.tensors, config.local)
        self.privacy: PrivateMean | None = None
        if config.privacy is not None:
            self.privacy = PrivateMean(
                config, self._client_ids, seed, mask_rounding(config, contract.tensors)
            )
        self._cohort: tuple[int, tuple[str, ...]] = (0, ())

    @property
    def shared(self) -> SharedState:
        """The shared state, float32. Each step makes a new one; none is changed in place."""
        return self._shared

    @property
    def broadcast(self) -> SharedState:
        """The shared state as clients receive it, rounded to the dtypes of the contract."""
        return broadcast(self._shared, self.contract.tensors)

    @property
    def round_under_way(self) -> int:
        """The current round: one more than the round of the shared state."""
        return self._shared.round_number + 1

    @property
    def num_clients(self) -> int:
        """Number of all clients."""
        return len(self._client_ids)

    @property
    def num_steps(self) -> int:
        """The number of rounds that had a usable update."""
        return self._optimizer.step

    def select_cohort(self, round_number: int) -> tuple[str, ...]:
        """The clients of a round, a function of (seed, round) alone, or a secret draw.

        Raises:
            ConfigError: The cohort is larger than the number of clients.
        """
        if self._cohort[0] != round_number:
            cohort = self.privacy.drawn_cohort(round_number) if self.privacy else None
            if cohort is None:
                size = known(self._config.cohort_size)
                cohort = select_cohort(self._client_ids, size, self._seed, round_number)
            self._cohort = (round_number, cohort)
        return self._cohort[1]

    def simulated_dropouts(self, round_number: int) -> frozenset[str]:
        """The clients of a round that do not answer in a simulation."""
        cohort, share = self.select_cohort(round_number), self._config.simulated_dropouts
        return simulated_dropouts(cohort, share, self._seed, round_number)

    @property
    def is_masked(self) -> bool:
        """Whether updates travel under masks; see `new_masked_round`."""
        return self._config.masks is not None

    def new_masked_round(
        self, verify_keys: Mapping[str, bytes], nodes: Sequence[str] | None = None
    ) -> MaskedRound:
        """The server's side of the current round, under masks.

        Args:
            verify_keys: Each that masks to its Ed25519 public key; they have these from elsewhere.
            nodes: Nodes that mask the sums of their clients; None: the clients of the cohort mask.

        Raises:
            ConfigError: Updates travel in the clear.
        """
        cohort, number = self.select_cohort(self.round_under_way), self.round_under_way
        players = cohort if nodes is None else nodes
        return MaskedRound(
            new_session(self._config, self.contract.hash(), number, len(players), verify_keys),
            players,
            new_fixed_point(self._config, self.contract.tensors, len(cohort)),
        )

    def receive_masked(
        self, updates: Aggregator, found: MaskedSum, num_updates: int, client_ids: Sequence[str]
    ) -> None:
        """Add what came out of a round under masks.

        Args:
            updates: The updates of the round so far.
            found: The sum. No stage and no bound on norms sees it: `FixedPoint` has judged it.
            num_updates: How many updates are in it.
            client_ids: The clients that were asked for it; at least as many.
        """
        assert isinstance(updates, WeightedMean)  # the config admits no other under masks
        whole = NodeUpdate(
            node_id="masks",
            round_number=self.round_under_way,
            contract_hash=self.contract.hash(),
            num_clients=num_updates,
            num_examples=found.num_examples,
            loss=found.weighted_loss / found.weight,
            delta=found.tensors,
        )
        updates.add_sum(whole, found.weight, client_ids)

    def new_aggregator(self) -> Aggregator:
        """An empty aggregator of the kind that the config names, for a chunk or a round."""
        settings = self._config.server
        return AGGREGATORS[settings.aggregator].of(settings)

    def receive(self, updates: Aggregator, update: ClientUpdate) -> bool:
        """Check one update and bound its norm. Add it to the others, or refuse and count it.

        Args:
            updates: The updates of a chunk or a round so far.
            update: The update that arrived, which may be malformed in any way.

        Returns:
            Whether it was accepted.
        """
        round_number = self.round_under_way
        try:
            self.contract.check(update, round_number)
            client = update.client_id
            if client not in self.select_cohort(round_number):
                raise ContractError(
                    f"client {client!r:.80} is not in the cohort of round {round_number}",
                    Refusal.COHORT,
                )
            arrived = as_received(self._in_order(update.delta))
            updates.tally.norms.append(euclidean_norm(arrived))
            delta, noted = self._stages.on_server(arrived, client, round_number)
            bounded, sizes = self._bounded(client, delta, update.num_examples)
            updates.add(dataclasses.replace(update, delta=bounded), self.weight_of(update))
        except ContractError as error:
            _LOG.warning("round %d: refused an update: %s", round_number, error)
            updates.refuse(str(error), error.reason)
            return False
        updates.tally.note(noted)
        updates.tally.sizes += sizes
        updates.tally.clipped += bounded is not delta
        return True

    def receive_sum(self, updates: Aggregator, update: NodeUpdate, asked: Sequence[str]) -> bool:
        """Check the sum of a node's updates. Add it to the others, or refuse and count it.

        Stages and the bound on norms see the node's mean, as they see an update: it is no longer
        than the longest update in it. What one client of the node did cannot be told.

        Args:
            updates: The updates of the round so far.
            update: The sum that arrived, which may be malformed in any way.
            asked: The clients of the node that were asked. Each that is not in the sum counts as a
                client without an answer.

        Returns:
            Whether it was accepted.
        """
        round_number = self.round_under_way
        try:
            if not isinstance(updates, WeightedMean):
                raise ContractError("a sum of updates can be part of a mean alone")
            self.contract.check_sum(update, round_number, len(asked))
            if others := set(asked).difference(self.select_cohort(round_number)):
                raise ContractError(f"client {min(others)!r:.80} was not asked", Refusal.COHORT)
            weight = self._weight_of_sum(update)
            whole = as_received(self._in_order(update.delta))
            mean = {n: (t.double() / weight).float() for n, t in whole.items()}
            updates.tally.norms.append(euclidean_norm(mean))
            delta, noted = self._stages.on_server(mean, update.node_id, round_number)
            examples = max(1, update.num_examples // update.num_clients)
            bounded, sizes = self._bounded(update.node_id, delta, examples)
            if bounded is not mean:
                whole = {name: tensor.double() * weight for name, tensor in bounded.items()}
            updates.add_sum(dataclasses.replace(update, delta=whole), weight, asked)
        except ContractError as error:
            _LOG.warning("round %d: refused a sum: %s", round_number, error)
            for _ in asked:
                updates.refuse(str(error), error.reason)
            return False
        for _ in range(len(asked) - update.num_clients):
            updates.refuse(f"node {update.node_id!r:.80}: a client gave no update")
        updates.tally.note(noted)
        updates.tally.sizes += sizes
        updates.tally.clipped += bounded is not delta
        return True

    def _bounded(
        self, sender: str, delta: Tensors, num_examples: int
    ) -> tuple[Tensors, list[torch.Tensor]]:
        """An update within its bounds, and its sizes, from which `NormBound` learns.

        Under privacy nothing is learned: what becomes of an update must not follow from others.
        """
        if self.privacy is not None:
            return self.privacy.bounded(sender, delta), []
        bounded, sizes = self._bound.bounded(sender, delta, num_examples)
        return bounded, [sizes]

    def weight_of(self, update: ClientUpdate) -> float:
        """The weight of an update; see `aggregation.update_weight`."""
        return update_weight(self._config.server.weighting, update.num_examples)

    def _in_order(self, delta: Tensors) -> Tensors:
        """The tensors in the order of the contract, by which sizes are told apart."""
        return {name: delta[name] for name in self.contract.tensors}

    def _weight_of_sum(self, update: NodeUpdate) -> float:
        is_uniform = self._config.server.weighting is Weighting.UNIFORM
        return float(update.num_clients if is_uniform else update.num_examples)

    def aggregate(self, updates: Aggregator) -> RoundSummary:
        """Step from the round's updates to the next shared state.

        Without any accepted update the round counts, and shared tensors, moments and the norm bound
        stay as they were. Under privacy there is a step in any case: it is not told who answered.

        Args:
            updates: The updates of the whole cohort.

        Raises:
            ContractError: The updates hold other tensors than the shared state.
            TrainingError: The step led to values that are not finite, or the round was not paid
                for (`PrivateMean.charge`). After any error the shared state and the round are
                unchanged.
        """
        round_number, tally = self.round_under_way, updates.tally
        tensors = self._shared.tensors
        aggregate: Tensors = {}
        if tally.num_updates or self.privacy is not None:
            aggregate = self._stages.on_aggregate(self._mean(updates), round_number)
            stepped, self._optimizer = self._step.step(self._trained(), aggregate, self._optimizer)
            if tally.sizes:  # under masks nobody knows the size of an update
                self._bound.learn(tally.sizes)
            tensors = {**tensors, **stepped.tensors}
        self._shared = SharedState(tensors, round_number)
        return RoundSummary(
            round_number=round_number,
            num_updates=tally.num_updates,
            refusals=tuple(tally.refusals),
            refused_by_reason=dict(sorted(tally.reasons.items())),
            num_clipped=tally.clipped,
            num_examples=tally.num_examples,
            loss=tally.loss,
            update_norm=euclidean_norm(aggregate),
            norm_quantiles={} if self.privacy is not None else tally.norm_quantiles,
            lr_factor=self._step.lr_factor(round_number),
            stages=self._stages.summary(tally.noted),
        )

    def _mean(self, updates: Aggregator) -> Tensors:
        """The aggregate of a round, under noise where there is any."""
        if self.privacy is None:
            return updates.result()
        return self.privacy.release(updates, self.contract.tensors, self.round_under_way)

    def _trained(self) -> SharedState:
        """The part of the shared state that the contract lists."""
        trained = {name: self._shared.tensors[name] for name in self.contract.tensors}
        return SharedState(trained, self._shared.round_number)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The complete state of the server for a checkpoint; see `load_state_tensors`."""
        optimizer = self._optimizer
        groups = (self._shared.tensors, optimizer.first, optimizer.second)
        tensors = {
            prefix + name: tensor
            for prefix, group in zip(PREFIXES, groups, strict=True)
            for name, tensor in group.items()
        }
        if self.privacy is not None:
            tensors[_RELEASES] = torch.tensor(self.privacy.num_releases)
        return {**tensors, _STEP: torch.tensor(optimizer.step), _SIZES: self._bound.state}

    def load_state_tensors(self, tensors: Tensors, round_number: int) -> None:
        """Continue from the tensors of `state_tensors`.

        Args:
            tensors: The state. One of version 0.2 has no sizes of updates; then none are known yet.
            round_number: The round after which it was taken.

        Raises:
            CheckpointError: The tensors belong to another model or optimizer. The server's state
                is unchanged.
        """
        present = self.state_tensors()
        tensors = {_SIZES: torch.zeros_like(present[_SIZES]), **tensors}
        if difference := first_difference(specs_of(tensors), specs_of(present)):
            raise CheckpointError(
                f"the checkpoint is of another model or server optimizer: {difference}; "
                "resume with the config, and the version of pfm_llm, that it was written under"
            )
        shared, first, second = (
            {name: tensor.clone() for name, tensor in behind(prefix, tensors).items()}
            for prefix in PREFIXES
        )
        self._shared = SharedState(shared, round_number)
        self._optimizer = OptimizerState(int(tensors[_STEP]), first, second)
        self._bound.state = tensors[_SIZES]
        if self.privacy is not None:
            self.privacy.committed = int(tensors[_RELEASES])
