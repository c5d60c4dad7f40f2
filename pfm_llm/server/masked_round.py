"""The server's side of a round under masks; `protocol.masks` describes the protocol.

What is here never holds an update of a single client without its masks.
"""

from collections.abc import Iterable, Mapping, Sequence

from pfm_llm.base.errors import ConfigError, ContractError, MaskError
from pfm_llm.config.choices import Weighting
from pfm_llm.config.schema import FederationConfig
from pfm_llm.config.settle import known
from pfm_llm.config.stages import MasksConfig
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.masks.agreement import KeyPair, own_mask, pair_mask
from pfm_llm.protocol.masks.messages import (
    Advertisement,
    MaskedUpdate,
    MaskSession,
    Reveal,
    roster_digest,
)
from pfm_llm.protocol.masks.neighbours import Graph, mask_graph, usual_number
from pfm_llm.protocol.masks.shares import joined, weights_at_zero
from pfm_llm.protocol.masks.words import FixedPoint, MaskedSum, add_masks, are_words, no_words
from pfm_llm.protocol.types import Refusal

Mask = tuple[bytes, int]
"""The key of a stream, and its sign."""


def new_session(
    config: FederationConfig,
    contract_hash: str,
    round_number: int,
    size: int,
    verify_keys: Mapping[str, bytes],
) -> MaskSession:
    """A round under masks, as both sides have it.

    Args:
        config: It has ``masks``.
        contract_hash: Hash of the update contract.
        round_number: The round, from 1.
        size: How many clients, or nodes, are asked.
        verify_keys: Each of them to its Ed25519 public key.

    Raises:
        ConfigError: Updates travel in the clear.
    """
    neighbours = _masks(config).neighbours or usual_number(size)
    return MaskSession(contract_hash, round_number, size, neighbours, verify_keys)


def new_fixed_point(
    config: FederationConfig, specs: Mapping[str, TensorSpec], cohort_size: int
) -> FixedPoint:
    """How updates travel in a round under masks.

    Args:
        config: It has ``masks`` and a stage ``clip``.
        specs: The tensors of an update.
        cohort_size: How many updates are in the sum at most.

    Raises:
        ConfigError: Updates travel in the clear.
    """
    most_examples = _masks(config).max_examples
    [norm] = [stage.clip.norm for stage in config.stages if stage.clip is not None]
    by_examples = config.server.weighting is Weighting.NUM_EXAMPLES
    return FixedPoint(specs, norm, cohort_size, most_examples, by_examples)


def mask_rounding(config: FederationConfig, specs: Mapping[str, TensorSpec]) -> float:
    """How far masks may move an update, by half a step in each number; 0 without masks."""
    if config.masks is None:
        return 0.0
    return new_fixed_point(config, specs, known(config.cohort_size)).largest_rounding


def _masks(config: FederationConfig) -> MasksConfig:
    if config.masks is None:
        raise ConfigError("updates travel in the clear; set federation.masks: true")
    return config.masks


class MaskedRound:
    """Carries the messages of a round between its clients, and adds up their words.

    Args:
        session: The round.
        cohort: The clients that are asked.
        fixed_point: How updates travel.

    Attributes:
        session: The same.
        fixed_point: The same.
    """

    def __init__(
        self, session: MaskSession, cohort: Sequence[str], fixed_point: FixedPoint
    ) -> None:
        self.session = session
        self.fixed_point = fixed_point
        self._cohort = frozenset(cohort)
        self._roster: dict[str, Advertisement] = {}
        self._graph: Graph = {}
        self._sharers: frozenset[str] = frozenset()
        self._survivors: set[str] = set()
        self._sum = no_words(fixed_point.num_words)

    def open(self, advertisements: Iterable[Advertisement]) -> list[Advertisement]:
        """The roster of the round: what each client gets to see.

        Args:
            advertisements: What arrived. A key that its client has not signed is left out, as no
                client would accept a roster with it.

        Raises:
            MaskError: Too few clients are left.
        """
        ordered = sorted(advertisements, key=lambda one: one.client_id)
        self._roster = {
            one.client_id: one
            for one in ordered
            if one.client_id in self._cohort and one.is_genuine(self.session)
        }
        self.session.check_enough(self._roster, "advertised keys")
        roster = list(self._roster.values())
        beacon = roster_digest(self.session, roster)
        self._graph = mask_graph(tuple(self._roster), self.session.num_neighbours, beacon)
        return roster

    def deliver(self, sent: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """Sort sealed shares by receiver.

        Args:
            sent: Sender to receiver to what is for it.

        Returns:
            Receiver to sender to the same.

        Raises:
            MaskError: Too few clients have shared with all others.
        """
        ids = self._roster.keys()
        whole = {c: own for c, own in sent.items() if c in ids and own.keys() == ids - {c}}
        self._sharers = frozenset(whole)
        self.session.check_enough(whole, "shared their secrets")
        return {
            receiver: {c: own[receiver] for c, own in whole.items() if c != receiver}
            for receiver in whole
        }

    def add(self, update: MaskedUpdate) -> None:
        """Add the words of one client.

        Raises:
            ContractError: The message is of another round or contract, has other words, or is of a
                client that has not shared its secrets, or that has sent words before.
        """
        client, session = update.client_id, self.session
        if update.contract_hash != session.contract_hash:
            raise ContractError(f"client {client!r:.80}: masked under another contract")
        if update.round_number != session.round_number:
            raise ContractError(
                f"client {client!r:.80}: masked for round {update.round_number!r:.80}, but round "
                f"{session.round_number} is under way",
                Refusal.ROUND,
            )
        if client not in self._sharers:
            raise ContractError(
                f"client {client!r:.80} takes no part in round {session.round_number}",
                Refusal.COHORT,
            )
        if client in self._survivors:
            raise ContractError(f"client {client!r:.80} has sent words before", Refusal.TWICE)
        if not are_words(update.words, len(self._sum)):
            raise ContractError(
                f"client {client!r:.80} sends no uint32[{len(self._sum)}]", Refusal.MALFORMED
            )
        self._sum += update.words
        self._survivors.add(client)

    def merge(self, others: Iterable["MaskedRound"]) -> None:
        """Add what other processes have added of other clients."""
        for other in others:
            self._sum += other._sum
            self._survivors |= other._survivors

    def close(self) -> tuple[str, ...]:
        """The clients whose words were added, in order of ids; the clients confirm these.

        Raises:
            MaskError: They are too few.
        """
        self.session.check_enough(self._survivors, "sent their words")
        return tuple(sorted(self._survivors))

    def unmask(self, reveals: Iterable[Reveal], num_updates: int | None = None) -> MaskedSum:
        """The sum of the updates of all survivors.

        Args:
            reveals: The last messages of the clients; not all survivors need to send one.
            num_updates: How many updates are in the words of all survivors; None: one each.

        Raises:
            MaskError: Too few clients have revealed shares, or these do not fit together.
            ContractError: The sum is impossible for updates within the bound of ``clip``.
        """
        usable = [one for one in reveals if self._is_complete(one)]
        self.session.check_enough((one.client_id for one in usable), "revealed their shares")
        usable = sorted(usable, key=lambda one: one.client_id)[: self.session.threshold]
        places = {client_id: place for place, client_id in enumerate(self._roster, start=1)}
        own = [places[one.client_id] for one in usable]
        weights = weights_at_zero(own)
        masks: list[Mask] = []
        for client in sorted(self._survivors):
            seed = joined([one.seeds[client] for one in usable], weights)
            masks.append(self._own_mask(client, seed))
        for client in sorted(self._sharers - self._survivors):
            key = joined([one.keys[client] for one in usable], weights)
            masks += self._pair_masks(client, key)
        add_masks(self._sum, masks)
        return self.fixed_point.decode(self._sum, num_updates or len(self._survivors))

    def _is_complete(self, reveal: Reveal) -> bool:
        vanished = self._sharers - self._survivors
        fits = reveal.seeds.keys() == self._survivors and reveal.keys.keys() == vanished
        return fits and reveal.client_id in self._survivors

    def _own_mask(self, client: str, seed: bytes | None) -> Mask:
        if seed is None:
            raise _unfit(client)
        return own_mask(self.session.context, client, seed), -1

    def _pair_masks(self, vanished: str, key: bytes | None) -> list[Mask]:
        """What the survivors among its neighbours have added for a client that vanished."""
        pair = None if key is None else KeyPair(key)
        if pair is None or pair.public != self._roster[vanished].mask_key:
            raise _unfit(vanished)
        masks = []
        for other in sorted(self._graph[vanished] & self._survivors):
            secret = pair.agree(self._roster[other].mask_key)
            stream, sign = pair_mask(self.session.context, secret, other, vanished)
            masks.append((stream, -sign))
        return masks


def _unfit(client: str) -> MaskError:
    return MaskError(
        f"the shares of client {client!r:.80} do not fit together, so its masks do not come off; "
        "the round is lost"
    )
