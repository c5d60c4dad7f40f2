"""The outputs of one client's windows, and the scores that the shared part gives them."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pfm_llm.data.history import NO_LABEL
from pfm_llm.model import head as recommender_head
from pfm_llm.model.batches import ChunkBatch, Dropout, spans
from pfm_llm.protocol.types import Tensors

Contexts = Sequence[torch.Tensor | None]
"""Per client the context term of its user vectors."""


@dataclass(frozen=True)
class Outputs:
    """The outputs of one client: positions whose next item is predicted.

    Attributes:
        vectors: float32 [K, D], user vectors; empty when only the history is needed.
        targets: int64 [K], the next item at each position.
        later: int64 [K, H - 1], the items after it up to a horizon of H, or `NO_TARGET`; None: H
            is 1.
        liked: int64 [K], whether the user liked it, 0 or 1, or `NO_LABEL`.
        met: int64 [H], the client's history up to the last target, oldest first.
        known: int64 [K], how many items of the history come before each target.
        kept: float32 [K, D], dropout factors on the user vectors in training, or None.
        kept_private: float32 [K, r], dropout factors on private vectors in training, or None.
        seen: bool [K, I] or [I], the items that are no candidates at each position; None: all
            items are candidates.
        items: int64 [M], the distinct items of all histories of the client, or None.
        hidden: int64 [N], the items that this step treats as new, or None.
        moved: float32 [K, D], the user vectors with a private LoRA of each position's past, as in
            serving, less those without; or None.
        read: float32 [K, r], the private vectors of each position's past, where they are known; or
            None.
        steps: By the names of `PrivatePart.coefficients`, what the client's own steps add at every
            position, float32 [n].
    """

    vectors: torch.Tensor
    targets: torch.Tensor
    liked: torch.Tensor
    met: torch.Tensor
    known: torch.Tensor
    kept: torch.Tensor | None = None
    kept_private: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    items: torch.Tensor | None = None
    later: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    moved: torch.Tensor | None = None
    read: torch.Tensor | None = None
    steps: Tensors = field(default_factory=dict)

    @classmethod
    def of_history(cls, items: torch.Tensor, liked: torch.Tensor) -> "Outputs":
        """Outputs in which every item of a history is a target; they have no user vectors.

        Args:
            items: int64 [n], oldest first.
            liked: int64 [n], 0, 1, or `NO_LABEL`.
        """
        place = torch.arange(len(items), device=items.device)
        return cls(torch.empty(0), items, liked, items, place)

    def with_dropout(
        self, dropout: Dropout, client: int, private_width: int, num_items: int
    ) -> "Outputs":
        """The same outputs with the dropout factors of a training step.

        Args:
            dropout: The dropout of the step.
            client: Index of the client in the chunk.
            private_width: Width r of the private vectors with dropout; 0: they have none.
            num_items: I, where the step treats some items as new; 0: it does not.
        """

        def keep(width: int, rate: float) -> torch.Tensor | None:
            if not width or not rate:
                return None
            return dropout.keep((len(self.targets), width), rate, client).to(self.vectors)

        kept = keep(self.vectors.shape[1], dropout.head)
        kept_private = keep(private_width, dropout.taste)
        hidden = None
        if num_items:
            # Drawn last: without hidden items, the other draws are the same.
            shown = dropout.keep((num_items,), dropout.items, client)
            hidden = (shown == 0).nonzero()[:, 0].to(self.targets.device)
        return dataclasses.replace(self, kept=kept, kept_private=kept_private, hidden=hidden)


@dataclass(frozen=True)
class Rated:
    """The outputs of a client whose target has a rating.

    Attributes:
        where: bool [K], which outputs have a label.
        items: int64 [R], the rated items.
        liked: float32 [R], 0 or 1.
        logits: float32 [R], the shared log-odds that an item is liked.
    """

    where: torch.Tensor
    items: torch.Tensor
    liked: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class SharedView:
    """One client's outputs under its own copy of the shared tensors.

    Attributes:
        own: One client's tensors without LoRA factors.
        outputs: The client's outputs.
        texts: float32 [I, D], whitened texts of the catalogue.
    """

    own: Tensors
    outputs: Outputs
    texts: torch.Tensor

    @functools.cached_property
    def scores(self) -> torch.Tensor:
        """Scores [K, I], with dropout in training; minus infinity for items of the history."""
        vectors, kept = self.outputs.vectors, self.outputs.kept
        return self._scored(vectors if kept is None else vectors * kept)

    @functools.cached_property
    def fixed_scores(self) -> torch.Tensor:
        """Scores [K, I] as in serving: without dropout and without gradient."""
        if self.outputs.kept is None:
            return self.scores.detach()
        with torch.no_grad():
            return self._scored(self.outputs.vectors)

    @functools.cached_property
    def rated(self) -> Rated:
        """The outputs whose target has a label."""
        where = self.outputs.liked != NO_LABEL
        items, liked = self.outputs.targets[where], self.outputs.liked[where].float()
        logits = recommender_head.like_logits(self.own, self.texts)[items]
        return Rated(where, items, liked, logits)

    def _scored(self, vectors: torch.Tensor) -> torch.Tensor:
        scores = recommender_head.score_items(self.own, vectors, self.texts)
        seen = self.outputs.seen
        return scores if seen is None else scores.masked_fill(seen, -torch.inf)


def contexts_of(batch: ChunkBatch, heads: Sequence[Tensors], texts: torch.Tensor) -> Contexts:
    """Per client the context term of its user vectors [K_c, D]; None without item_context.

    Args:
        batch: The windows.
        heads: The head parameters of each client.
        texts: float32 [I, D], whitened.
    """
    if recommender_head.CONTEXT_PROJ not in heads[0]:
        return [None] * len(heads)
    found: list[torch.Tensor | None] = []
    pairs = zip(spans(batch.positions_per_client), spans(batch.outputs_per_client), strict=True)
    for head, (positions, outputs) in zip(heads, pairs, strict=True):
        _, lengths = batch.rows[positions].unique_consecutive(return_counts=True)
        windows = batch.items[positions].split(lengths.tolist())
        context = recommender_head.window_contexts(head, windows, texts)
        # The indices in `batch.outputs` count over all clients.
        found.append(context[batch.outputs[outputs] - positions.start])
    return found
