"""What a client minimises, as a function of its own tensors and of its read-out states.

Per position t of the history, with s_t the scores of the catalogue and y_t the next item,

    loss = mean_t CE(s_t, y_t)  [+ sum_t BCE(l_t, liked_t) / 64  with the task ``like``]

where l_t is the log-odds that the user likes y_t. A rating says as much of its item whoever gave
it, so ratings count alike and not users: the mean over a user's ratings lost .02 AUC (docs/log.md).

With ``unseen_only`` the softmax is over the items that the user had not met by then, for these are
what is ranked at serving. Over all items it teaches that what one likes best, having met it, does
not come: the gain of a taste vector was half as large (docs/log.md).

With a private taste vector each loss has a twin, in which the vector of the past is added to the
same scores (`taste`; one that is read has dropout too). The twin trains the basis alone: no
gradient of it reaches the shared scores. So the shared part learns what it would learn without a
private one, and serves those who have none; when the twin trained both, the shared part left to
the private one what it could have learned itself.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pfm_llm.config.choices import Task
from pfm_llm.model import head as recommender_head
from pfm_llm.model.private import taste
from pfm_llm.protocol.types import Tensors
from pfm_llm.text.encoding import NO_LABEL

_RATINGS = 64
"""A loss of ratings is of the size of a mean over so many; Adam makes nothing of it."""


@dataclass(frozen=True)
class Outputs:
    """What is read out of one client's windows, position by position.

    Attributes:
        vectors: float32 [K, D], user vectors.
        kept: float32 [K, D], dropout's factors on the user vectors in training, or None. Taste
            vectors are fitted to the scores that serving has, without dropout.
        kept_taste: float32 [K, r], the same on taste vectors that are read.
        targets: int64 [K], the next item at each position.
        liked: int64 [K], 0, 1, or `NO_LABEL`.
        met: int64 [H], all that was met up to the last target, oldest first.
        known: int64 [K], how much of it came before each target.
        seen: bool [K, I], what is no candidate at each position; None: everything is one.
    """

    vectors: torch.Tensor
    targets: torch.Tensor
    liked: torch.Tensor
    met: torch.Tensor
    known: torch.Tensor
    kept: torch.Tensor | None = None
    kept_taste: torch.Tensor | None = None
    seen: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of one client.

    Attributes:
        item_texts: float32 [I, D], whitened.
        tasks: What is learned.
        block_size: Positions that one fitted taste vector predicts; None without taste vectors.
        unseen_only: Whether what a user has met is no candidate.
    """

    item_texts: torch.Tensor
    tasks: tuple[Task, ...]
    block_size: int | None
    unseen_only: bool = False

    def to(self, device: torch.device) -> "Objective":
        """The same on another device."""
        return dataclasses.replace(self, item_texts=self.item_texts.to(device))

    def loss(self, own: Tensors, outputs: Outputs, personal: bool = True) -> torch.Tensor:
        """The client's loss (nats), a scalar.

        Args:
            own: One client's tensors: head, and basis with taste vectors.
            outputs: Read out at positions that have a target.
            personal: Whether taste vectors take part, where there are any.
        """
        block = self._blocks(outputs) if personal else None
        vectors, kept = outputs.vectors, outputs.kept
        dropped = vectors if kept is None else vectors * kept
        scores = self._scores(own, dropped, outputs.seen)
        loss = F.cross_entropy(scores, outputs.targets)
        if block is not None:
            fixed = scores.detach()
            if kept is not None:
                with torch.no_grad():
                    fixed = self._scores(own, vectors, outputs.seen)
            added = self._past_tastes(own, outputs, fixed, block)
            loss = loss + F.cross_entropy(fixed + added, outputs.targets)
        if Task.LIKE in self.tasks:
            loss = loss + self._like_loss(own, outputs, block)
        return loss

    def _past_tastes(
        self, own: Tensors, outputs: Outputs, scores: torch.Tensor, block: torch.Tensor
    ) -> torch.Tensor:
        """What the taste of the past adds to each position's scores, [K, I]."""
        targets = outputs.targets
        if taste.READ_IN in own:
            read = taste.read_vectors(own, outputs.met)[outputs.known]
            read = read if outputs.kept_taste is None else read * outputs.kept_taste
            return read @ self.features(own, Task.NEXT_ITEM).T
        features, prior = self._basis(own, Task.NEXT_ITEM)
        past = taste.past_weights(own, Task.NEXT_ITEM, block)
        return taste.fit_next_item(scores, targets, features, prior, past)[block] @ features.T

    def _scores(
        self, own: Tensors, vectors: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores [K, I] of the catalogue, minus infinity for what is no candidate."""
        scores = recommender_head.score_items(own, vectors, self.item_texts)
        return scores if seen is None else scores.masked_fill(seen, -torch.inf)

    def _like_loss(
        self, own: Tensors, outputs: Outputs, block: torch.Tensor | None
    ) -> torch.Tensor:
        known, items, liked, logits = self._likes(own, outputs)
        if not known.any():
            return outputs.vectors.new_zeros(())
        loss = _rating_loss(logits, liked)
        if block is not None:
            fixed = logits.detach()
            features, prior = self._basis(own, Task.LIKE, items)
            past = taste.past_weights(own, Task.LIKE, block)[:, known]
            fitted = taste.fit_likes(fixed, liked, features, prior, past)
            added = (fitted[:, block[known]] * features.transpose(0, 1)).sum(2)
            # Each fit by itself: what is averaged shall differ.
            personal = (fixed + added).flatten()
            loss = loss + _rating_loss(personal, liked.repeat(len(added))) / len(added)
        return loss

    @torch.no_grad()
    def fit_taste(self, own: Tensors, outputs: Outputs) -> dict[str, torch.Tensor]:
        """A client's taste vectors, fitted to all of its positions; zero without any.

        Where the next item's is read, `Outputs.vectors` and `Outputs.seen` are not asked for.

        Returns:
            Name to float32 vector, for the private state.
        """
        one_block = torch.zeros_like(outputs.targets)
        if taste.READ_IN in own:
            found = taste.read_vectors(own, outputs.met)
        else:
            scores = self._scores(own, outputs.vectors, outputs.seen)
            features, prior = self._basis(own, Task.NEXT_ITEM)
            past = taste.past_weights(own, Task.NEXT_ITEM, one_block)[-1:]
            found = taste.fit_next_item(scores, outputs.targets, features, prior, past)
        vectors = {taste.vector_name(Task.NEXT_ITEM): found[-1]}
        if Task.LIKE in self.tasks:
            known, items, liked, logits = self._likes(own, outputs)
            features, prior = self._basis(own, Task.LIKE, items)
            past = taste.past_weights(own, Task.LIKE, one_block)[-1:, known]
            fitted = taste.fit_likes(logits, liked, features, prior, past)
            vectors[taste.vector_name(Task.LIKE)] = fitted[:, 0].flatten() / len(fitted)
        return vectors

    def _likes(
        self, own: Tensors, outputs: Outputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which positions have a label, bool [K]; and of those item, label and log-odds."""
        known = outputs.liked != NO_LABEL
        items, liked = outputs.targets[known], outputs.liked[known].float()
        return known, items, liked, recommender_head.like_logits(own, self.item_texts)[items]

    def features(self, own: Tensors, task: Task) -> torch.Tensor:
        """`taste.item_features` of the catalogue."""
        return taste.item_features(own, task, self.item_texts)

    def _basis(
        self, own: Tensors, task: Task, items: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of some items, or of all, and the prior's precisions."""
        features = self.features(own, task)
        return features if items is None else features[items], taste.prior_precisions(own, task)

    def _blocks(self, outputs: Outputs) -> torch.Tensor | None:
        if self.block_size is None:
            return None
        return taste.blocks(len(outputs.targets), self.block_size).to(outputs.targets.device)


def _rating_loss(logits: torch.Tensor, liked: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, liked, reduction="sum") / _RATINGS
