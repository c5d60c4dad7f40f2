"""What a client minimises, as a function of its own tensors and of its read-out states.

Per position t of the history, with s_t the scores of the catalogue and y_t the next item,

    loss = mean_t CE(s_t, y_t)  [+ sum_t BCE(l_t, liked_t) / 64  with the task ``like``]

where l_t is the log-odds that the user likes y_t. A rating says as much of its item whoever gave
it, so ratings count alike and not users: the mean over a user's ratings lost .02 AUC (docs/log).

With ``unseen_only`` the softmax is over the items that the user had not met by then, since serving
ranks these. A softmax over all items teaches that the items a user likes best do not come, because
the user has met them: the gain of the user embedding was half as large (docs/log).

Where a private part adds to scores, each loss has a twin, in which the scores that the past adds
(`PrivatePart.past_scores`) are added to the same shared scores. The twin trains the features of the
private part alone: no gradient of it reaches the shared scores. So the shared part learns what it
would learn alone, and serves users without a private part. When the twin trained both, the shared
part left to the private one what it could have learned itself.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pfm_llm.config.choices import Task
from pfm_llm.model.outputs import Outputs, SharedView
from pfm_llm.model.private import PrivatePart
from pfm_llm.protocol.types import Tensors

_RATINGS = 64
"""A loss of ratings is of the size of a mean over so many; Adam makes nothing of it."""


@dataclass(frozen=True)
class Objective:
    """The loss of one client.

    Attributes:
        item_texts: float32 [I, D], whitened.
        tasks: The tasks that are learned.
        private: The private part.
        unseen_only: Whether the items that a user has met are no candidates.
    """

    item_texts: torch.Tensor
    tasks: tuple[Task, ...]
    private: PrivatePart
    unseen_only: bool = False

    def to(self, device: torch.device) -> "Objective":
        """The same on another device."""
        return dataclasses.replace(self, item_texts=self.item_texts.to(device))

    def loss(self, own: Tensors, outputs: Outputs, personal: bool = True) -> torch.Tensor:
        """The client's loss (nats), a scalar.

        Args:
            own: One client's tensors but for LoRA factors.
            outputs: Read out at positions that have a target.
            personal: Whether the private part takes part.
        """
        view = SharedView(own, outputs, self.item_texts)
        loss = F.cross_entropy(view.scores, outputs.targets)
        added = self.private.past_scores(view) if personal else None
        if added is not None:
            loss = loss + F.cross_entropy(view.fixed_scores + added, outputs.targets)
        if Task.LIKE in self.tasks:
            loss = loss + self._like_loss(view, personal)
        return loss

    @torch.no_grad()
    def fit(self, own: Tensors, outputs: Outputs) -> dict[str, torch.Tensor]:
        """A client's private tensors, fitted to all of its outputs; see `PrivatePart.fit`."""
        return self.private.fit(SharedView(own, outputs, self.item_texts))

    def _like_loss(self, view: SharedView, personal: bool) -> torch.Tensor:
        rated = view.rated
        if not rated.where.any():
            return view.outputs.vectors.new_zeros(())
        loss = _rating_loss(rated.logits, rated.liked)
        added = self.private.past_likes(view) if personal else None
        if added is not None:
            # Each fit by itself, so that the fits whose logits are averaged differ.
            logits = (rated.logits.detach() + added).flatten()
            loss = loss + _rating_loss(logits, rated.liked.repeat(len(added))) / len(added)
        return loss


def _rating_loss(logits: torch.Tensor, liked: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, liked, reduction="sum") / _RATINGS
