"""The loss of one client, as a function of its tensors and of its outputs.

With s_t the scores of the catalogue at position t of the history, y_t the next item and y_{t+k} the
k-th one after it,

    loss = mean_t sum_k g_k CE(s_t, y_{t+k})  [+ sum_t BCE(l_t, liked_t) / 64  with ``like``]

    g_k ~ 1 / (k + 1), of sum 1,   k from 0 up to the horizon, or to the history's end,

where l_t is the log-odds that the user likes y_t. What a user meets next depends on chance and on
the moment; the later items tell more of the user. PinnerFormer (Pancha et al. 2022, arXiv
2205.04507, section 3.4) predicts the actions of a window ahead for this reason, all alike; here the
next one counts most. Every rating has the same weight, whoever gave it. A mean over each user's
ratings instead lowered the AUC by .02 (docs/log).

With ``unseen_only`` the softmax is over the items that are not in the history before y_t, because
serving ranks only these. A softmax over all items learns low scores for a user's favourite items,
because these are already in the history. The gain of the user embedding was then half as large
(docs/log).

A private part that adds to scores adds a second term to each loss. In it, the scores that follow
from the user's past (`PrivatePart.past_scores`) are added to the shared scores, which receive no
gradient. The second term therefore trains only the features of the private part, and the shared
part learns the same as without a private part. When the second term trained both, the shared part
became worse for users without a private part.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pfm_llm.config.choices import Task
from pfm_llm.model import head as recommender_head
from pfm_llm.model import new_items
from pfm_llm.model.items.codes import ItemCodes
from pfm_llm.model.outputs import Outputs, SharedView
from pfm_llm.model.private import PrivatePart
from pfm_llm.protocol.types import Tensors
from pfm_llm.text.encoding import NO_TARGET

_RATINGS = 64
"""The sum over ratings is divided by this number, so that it has the size of a mean."""


@dataclass(frozen=True)
class Objective:
    """The loss of one client.

    Attributes:
        item_texts: float32 [I, D], whitened.
        tasks: The tasks to learn.
        private: The private part.
        unseen_only: Whether the softmax leaves out the items of the user's history.
        codes: The vectors that items share; None: each item has rows of its own.
    """

    item_texts: torch.Tensor
    tasks: tuple[Task, ...]
    private: PrivatePart
    unseen_only: bool = False
    codes: ItemCodes | None = None

    def to(self, device: torch.device) -> "Objective":
        """The same objective on another device."""
        codes = None if self.codes is None else self.codes.to(device)
        return dataclasses.replace(self, item_texts=self.item_texts.to(device), codes=codes)

    def loss(self, own: Tensors, outputs: Outputs, personal: bool = True) -> torch.Tensor:
        """The client's loss (nats), a scalar.

        Args:
            own: One client's tensors without LoRA factors.
            outputs: The client's outputs; each has a target.
            personal: Whether the private part is active.
        """
        view = SharedView(own, outputs, self.item_texts)
        loss = self._items_ahead(view.scores, outputs)
        private = self._private_loss(view) if personal else None
        if private is not None:
            loss = loss + private
        if recommender_head.ITEM_MET in own and outputs.items is not None:
            loss = loss + recommender_head.met_term(own, outputs.items)
        if outputs.hidden is not None:
            hidden = new_items.scores_with_hidden(view, outputs.hidden)
            loss = loss + self._items_ahead(hidden, outputs)
        if Task.LIKE in self.tasks:
            loss = loss + self._like_loss(view, personal)
        return loss

    def private_loss(self, own: Tensors, outputs: Outputs) -> torch.Tensor:
        """The term of `loss` that trains what the private part adds to scores (nats), a scalar."""
        found = self._private_loss(SharedView(own, outputs, self.item_texts))
        assert found is not None, "the private part adds to scores"
        return found

    def _private_loss(self, view: SharedView) -> torch.Tensor | None:
        added = self.private.past_scores(view)
        return None if added is None else self._items_ahead(view.fixed_scores + added, view.outputs)

    @torch.no_grad()
    def fit(self, own: Tensors, outputs: Outputs) -> dict[str, torch.Tensor]:
        """A client's private tensors, fitted to all of its outputs; see `PrivatePart.fit`."""
        return self.private.fit(SharedView(own, outputs, self.item_texts))

    @staticmethod
    def _items_ahead(scores: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """The weighted cross-entropy of the items after each position, a scalar."""
        later = outputs.later
        if later is None or not later.shape[1]:
            return F.cross_entropy(scores, outputs.targets)
        ahead = torch.cat([outputs.targets[:, None], later], 1)
        found = scores.log_softmax(1).gather(1, ahead.clamp_min(0))
        # An item that the user meets again is no candidate, and no target either.
        counts = (ahead != NO_TARGET) & found.isfinite()
        weights = counts / (1 + torch.arange(ahead.shape[1], device=scores.device))
        weights = weights / weights.sum(1, keepdim=True)
        return -(weights * found.where(counts, 0.0)).sum(1).mean()

    def _like_loss(self, view: SharedView, personal: bool) -> torch.Tensor:
        rated = view.rated
        if not rated.where.any():
            return view.outputs.vectors.new_zeros(())
        loss = _rating_loss(rated.logits, rated.liked)
        added = self.private.past_likes(view) if personal else None
        if added is not None:
            # Serving averages the logits of several fits. Each fit has its own loss here, so that
            # the fits do not become alike.
            logits = (rated.logits.detach() + added).flatten()
            loss = loss + _rating_loss(logits, rated.liked.repeat(len(added))) / len(added)
        return loss


def _rating_loss(logits: torch.Tensor, liked: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, liked, reduction="sum") / _RATINGS
