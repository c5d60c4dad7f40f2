"""The worker of a node: calls on what it holds. Sums, codes and counts leave it, and no texts."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pfm_llm import __version__
from pfm_llm.base.errors import ContractError, NodeRefused, PfmError, StorageError
from pfm_llm.base.files import make_private_dir
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.federation.server_side import dtype_of
from pfm_llm.node.figures import counts_of, figures_of
from pfm_llm.node.masking import Masking, summed
from pfm_llm.node.membership import Membership, federations, join
from pfm_llm.node.site import SiteConfig
from pfm_llm.node.slots import Left, Slots
from pfm_llm.protocol import mask_messages as steps
from pfm_llm.protocol.calls import CALLS
from pfm_llm.protocol.messages import (
    AboutReply,
    AboutRequest,
    Agreed,
    EvaluateReply,
    EvaluateRequest,
    ForgetReply,
    ForgetRequest,
    Message,
    TrainReply,
    TrainRequest,
    UpdateHead,
    decode,
    encode,
)
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.transport import as_received, as_sent
from pfm_llm.protocol.types import ClientUpdate
from pfm_llm.server.aggregation import WeightedMean, update_weight

_log = logging.getLogger(__name__)


class Worker:
    """A node in this process, which answers one call at a time.

    Args:
        site: What the node's owner decides.
        processes: This process, alone.

    Raises:
        StorageError: The node's folder, or its key for masks, cannot be made or read.
    """

    def __init__(self, site: SiteConfig, processes: Processes) -> None:
        self._site = site
        self._processes = processes
        self._left = Left(make_private_dir(site.root))
        self._masking = Masking(site)
        self._member: Membership | None = None
        self._lock = threading.Lock()

    def answer(self, call: str, header: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Answer a call in bytes, whatever they are.

        Args:
            call: A key of `protocol.calls.CALLS`.
            header: JSON of the request.
            body: Its tensors.

        Returns:
            Header and body of the answer.

        Raises:
            NodeRefused: The only error. Its message is for the node's own log.
        """
        if call not in CALLS:
            raise NodeRefused(NodeRefusal.UNKNOWN_CALL, f"there is no call {call!r:.80}")
        act: Callable[[Any], Message] = getattr(self, call)  # each is a method of this name
        try:
            return encode(act(decode(CALLS[call][0], header, body)))
        except NodeRefused:
            raise
        except StorageError as error:
            raise NodeRefused(NodeRefusal.STORAGE, str(error)) from error
        except PfmError as error:
            raise NodeRefused(NodeRefusal.FAILED, str(error)) from error
        except Exception as error:  # whatever it is, no text of it may leave
            _log.exception("the call %s failed", call)
            raise NodeRefused(NodeRefusal.FAILED, repr(error)) from error

    def about(self, request: AboutRequest) -> AboutReply:
        """Tell what the node is, and take part in a federation if the request describes one.

        Raises:
            NodeRefused: See `membership.join`. The node stays in the federation that it was in.
            StorageError: See `membership.join`.
        """
        with self._lock:
            if request.settings is not None:
                self._masking.drop()
                self._member = join(self._site, request, self._processes, self._left)
            member, site = self._member, self._site
            known: dict[str, Any] = {}
            if member is not None:
                hashes = member.agreement
                known = {
                    "agreed": Agreed(
                        contract=hashes.contract, tensors=hashes.tensors, settings=hashes.settings
                    ),
                    "num_clients": len(member.slots),
                    "dtype": dtype_of(member.run.model),
                }
            return AboutReply(
                version=__version__,
                min_users=site.min_users_per_sum,
                single_updates=site.allow.single_updates,
                masks=self._masking.keys,
                **known,
            )

    def train(self, request: TrainRequest) -> TrainReply:
        """Train some clients for one round: the weighted sum of their changes, or each change.

        Private states that are trained are in the store when this returns.

        Raises:
            NodeRefused: The node is in another federation; the owner does not allow it, or only
                under masks; a slot does not exist; the round was asked for other slots; or too few
                users are left.
            StorageError: A private state cannot be read or written.
        """
        with self._lock:
            member = self._member_of(request.agreement)
            if request.single and not self._site.allow.single_updates:
                raise NodeRefused(NodeRefusal.NOT_ALLOWED, "allow.single_updates is false")
            self._masking.check_clear()
            updates = self._trained(member, request)
            if request.single:
                return _each(updates, member.slots.clients(request.slots))
            self._check_enough(member, [update.client_id for update in updates])
            return _sum(member, updates)

    def advertise(self, request: steps.AdvertiseRequest) -> steps.AdvertiseReply:
        """Begin a round under masks: the node's new keys, signed.

        Raises:
            NodeRefused: The node is in another federation; or see `Masking.advertise`.
        """
        with self._lock:
            return self._masking.advertise(request, self._member_of(request.agreement))

    def share(self, request: steps.ShareRequest) -> steps.ShareReply:
        """See `Masking.share`."""
        with self._lock:
            return self._masking.share(request)

    def mask(self, request: steps.MaskRequest) -> steps.MaskReply:
        """As `train`, for a sum that leaves under masks.

        Raises:
            NodeRefused: As `train`; or the step is out of order.
            StorageError: A private state cannot be read or written.
        """
        with self._lock:
            member = self._member_of(request.agreement)
            self._masking.check_may_mask(request)
            updates = self._trained(member, request)
            words, clients = summed(member, updates, request.cohort_size)
            self._check_enough(member, clients)
            return self._masking.mask(request, words, len(clients))

    def confirm(self, request: steps.ConfirmRequest) -> steps.ConfirmReply:
        """See `Masking.confirm`."""
        with self._lock:
            return self._masking.confirm(request)

    def reveal(self, request: steps.RevealRequest) -> steps.RevealReply:
        """See `Masking.reveal`."""
        with self._lock:
            return self._masking.reveal(request)

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Measure a shared state on held-out items, or count training interactions.

        Raises:
            NodeRefused: The node is in another federation, the owner does not allow the split, or
                the tensors are not those of the contract.
            StorageError: A private state cannot be read.
        """
        with self._lock:
            member = self._member_of(request.agreement)
            fewest = self._site.min_users_per_figure
            if not request.modes:
                return counts_of(member, self._left, fewest)
            if request.split not in self._site.allow.evaluation:
                raise NodeRefused(NodeRefusal.NOT_ALLOWED, "allow.evaluation lacks the split")
            most = self._site.max_evaluated_users
            return figures_of(member, self._left, request, fewest, most)

    def forget(self, request: ForgetRequest) -> ForgetReply:
        """Delete all that the node has made of a user, in every federation; see docs/deploy.md.

        The user's rows in the node's data are the owner's to delete. Until then the user's client,
        and a silo that the user is part of, takes part in nothing. The answer does not tell whether
        there was such a user.

        Raises:
            NodeRefused: The node takes part in no federation, so it knows no user.
            StorageError: A file could not be deleted; call it again.
        """
        with self._lock:
            member = self._member_of(None)
            interactions = member.run.data.interactions
            if request.user in interactions.user_ids:
                histories = member.run.clients.histories
                client = histories.client_of(interactions.user(request.user))
                self._left.add(client)
                member.slots.forget(client)
                for folder in federations(self._site):
                    Slots(folder, ()).forget(client)
                    PrivateStore(folder).forget(client)
                # Trunk states lie apart from the private states where cache.dir is set.
                PrivateStore(member.run.clients.cache.root.parent).forget(client)
            return ForgetReply()

    def _trained(self, member: Membership, request: TrainRequest) -> list[ClientUpdate]:
        """The usable updates of the clients that were asked, whose private states are stored."""
        asked = list(member.slots.clients(request.slots))
        shared = member.shared(request.tensors, request.round_number - 1)
        if not request.single:
            self._check_enough(member, asked)
        member.asked.ask(request.round_number, request.slots)
        store = member.run.clients.store
        if request.discard_newer is not None:
            store.discard_newer(request.discard_newer)
        store.prune(request.oldest_commit)
        trainer = member.trainer(request.cohort_size)
        return [
            update
            for chunk in trainer.chunks(asked)
            for update in trainer.train_chunk(chunk, shared)
            if _is_usable(member, update, request.round_number)
        ]

    def _member_of(self, agreement: str | None) -> Membership:
        if self._member is None:
            raise NodeRefused(NodeRefusal.NOT_READY)
        if agreement not in (None, self._member.agreement.hash()):
            raise NodeRefused(NodeRefusal.AGREEMENT)
        return self._member

    def _check_enough(self, member: Membership, clients: list[str]) -> None:
        users, fewest = member.num_users(clients), self._site.min_users_per_sum
        if not clients or users < fewest:
            raise NodeRefused(
                NodeRefusal.TOO_FEW, f"a sum over {users} users, min_users_per_sum is {fewest}"
            )


def _is_usable(member: Membership, update: ClientUpdate, round_number: int) -> bool:
    try:
        member.run.model.contract.check(update, round_number)
    except ContractError as error:
        _log.warning("left out of the round: %s", error)
        return False
    return True


def _each(updates: list[ClientUpdate], slots: Mapping[str, int]) -> TrainReply:
    """Every update by itself, by slot."""
    if not updates:
        raise NodeRefused(NodeRefusal.TOO_FEW, "no client has a usable update")
    ordered = sorted(updates, key=lambda update: slots[update.client_id])
    heads = [
        UpdateHead(
            slot=slots[update.client_id],
            num_clients=1,
            num_examples=update.num_examples,
            loss=update.loss,
        )
        for update in ordered
    ]
    return TrainReply(
        round_number=ordered[0].round_number,
        contract_hash=ordered[0].contract_hash,
        updates=tuple(heads),
        tensors={f"{i}/{name}": t for i, u in enumerate(ordered) for name, t in u.delta.items()},
    )


def _sum(member: Membership, updates: list[ClientUpdate]) -> TrainReply:
    """The weighted sum of the updates, held in float64 until it is complete."""
    weighting, total = member.config.federation.server.weighting, WeightedMean()
    for update in updates:
        exact = dataclasses.replace(update, delta=as_received(update.delta))
        total.add(exact, update_weight(weighting, update.num_examples))
    tally, sent = total.tally, member.run.model.contract.tensors
    head = UpdateHead(
        slot=None,
        num_clients=tally.num_updates,
        num_examples=tally.num_examples,
        loss=tally.weighted_loss / tally.total_weight,
    )
    return TrainReply(
        round_number=updates[0].round_number,
        contract_hash=updates[0].contract_hash,
        updates=(head,),
        tensors={f"0/{name}": t for name, t in as_sent(total.summed(), sent).items()},
    )
