"""Scores of the catalogue for many users in one pass, each with their own private part."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm.base.errors import ArtefactError, DataError
from pfm_llm.client.trunk_cache import TrunkStates, trunk_states
from pfm_llm.data.history import History
from pfm_llm.evaluation.evaluator import parts_of
from pfm_llm.evaluation.results import judged_mode
from pfm_llm.evaluation.scorer import Scorer
from pfm_llm.model import head as recommender_head
from pfm_llm.model.build import ModelParts
from pfm_llm.model.cohort import Parts
from pfm_llm.model.private.last_layer import LastTokens
from pfm_llm.protocol.types import Tensors
from pfm_llm.runs.run import Trained


@dataclass(frozen=True)
class Served:
    """One user who is to be served.

    Attributes:
        history: What the user has met, oldest first.
        private: The user's private tensors; None: the shared part alone serves them.
        kept: What a pass leaves of the history, so that the next one is shorter: filled by the
            first pass that it is given to, and valid for this history and this shared state alone.
            None: nothing is kept.
    """

    history: History
    private: Tensors | None = None
    kept: LastTokens | None = None


class StackedServing:
    """Ranks the catalogue for many users at a time.

    A user's scores do not depend on who else is served in the pass. Users whose history is empty
    rank by what is learned of items, and by a private part if they have one.

    Args:
        parts: The model.
        trained: The shared state, and the weight of private parts.

    Attributes:
        parts: As given.
        trained: As given.
        states: The trunk states of windows.
    """

    def __init__(self, parts: ModelParts, trained: Trained) -> None:
        self.parts = parts
        self.trained = trained
        # Users' states are computed when they are needed, and not kept.
        self.states: TrunkStates = lambda windows, _: trunk_states(parts.trunk, windows)
        self._scorer = Scorer(parts.model, parts.encoder, self.states)

    def scores(
        self,
        users: Sequence[Served],
        weight: float | None = None,
        candidates: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores of items, float32 [U, K]; higher is better.

        Args:
            users: U users, at least one.
            weight: Factor on private parts, 0 to 1.5; None: as it was set, or chosen, in training.
            candidates: Internal ids of the items to score, int [K]; None: the whole catalogue.

        Raises:
            DataError: A history is empty and the model has nothing to rank by.
            ArtefactError: The scores are not finite numbers.
        """
        found: list[np.ndarray | None] = [None] * len(users)
        kinds = [_kind(user) for user in users]
        for kind in dict.fromkeys(kinds):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            scores = self._of([users[row] for row in rows], weight, candidates)
            for row, one in zip(rows, scores, strict=True):
                found[row] = one
        stacked = np.stack([one for one in found if one is not None])
        if not np.isfinite(stacked).all():
            raise ArtefactError(
                "the model scores items with numbers that are not finite: its tensors are too "
                "large; train it again, or take another adapter"
            )
        return stacked

    def fit(self, histories: Sequence[History]) -> list[dict[str, torch.Tensor]]:
        """The private tensors of each history, where they follow from it without any step.

        The same history gives the same bits, whatever other histories are fitted beside it.

        Raises:
            DataError: The private part takes gradient steps, or reads texts of whole windows.
        """
        if not self.fits:
            raise DataError(
                "this private part is trained by steps, and does not follow from a history alone; "
                "use Recommender.personalise"
            )
        found = []
        for history in histories:
            stacked = self._scorer.stack(self.trained.shared, {}, 1)
            fitted = self.parts.model.fit_without_text([history], stacked)
            found.append({name: value[0].cpu() for name, value in fitted.items()})
        return found

    def item_vectors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors of the items: of their whitened texts [I, D], and learned ones [I, E] or None."""
        stacked = self._scorer.stack(self.trained.shared, {}, 1)
        (own,) = self.parts.model.slices(stacked, 1)
        return self.parts.model.item_texts, own.get(recommender_head.ITEM_IDS)

    @property
    def weight(self) -> float:
        """Factor on private parts, as it was set, or chosen, in training."""
        return self.trained.private_weight

    @property
    def fits(self) -> bool:
        """Whether `fit` gives the private part of a history."""
        private = self.parts.private
        return not (private.takes_steps or private.reads_text or private.settings.steps)

    def _of(
        self, users: Sequence[Served], weight: float | None, candidates: np.ndarray | None
    ) -> np.ndarray:
        """Scores of users of one kind: all with a history or none, and so with a private part."""
        private = [user.private for user in users if user.private is not None]
        own = {name: torch.stack([one[name] for one in private]) for name in (private or [{}])[0]}
        stacked = self._scorer.stack(self.trained.shared, own, len(users))
        mode = judged_mode(bool(private))
        modes = parts_of([mode], self.trained.private_weight if weight is None else weight)
        if len(users[0].history):
            # A name for each row; they name nobody.
            histories = {str(row): [user.history] for row, user in enumerate(users)}
            with self._keeping(users):
                return self._scorer.score(histories, stacked, modes, candidates)[mode]
        return self._unread(len(users), stacked, modes[mode], candidates)

    @contextlib.contextmanager
    def _keeping(self, users: Sequence[Served]) -> Iterator[None]:
        """A block in which a pass goes on from what is kept of the users, or fills it."""
        kept = [user.kept or LastTokens() for user in users]
        tokens, layers = LastTokens.joined(kept), self.parts.model.layers
        is_filled = tokens.hidden is not None
        is_wanted = any(user.kept is not None for user in users) and self._keeps
        layers.tokens = tokens if is_wanted else None
        try:
            yield
        finally:
            layers.tokens = None
        if not is_filled:
            tokens.fill(kept)

    @functools.cached_property
    def _keeps(self) -> bool:
        """Whether a pass leaves something that no private part changes."""
        private = self.parts.private
        modules = private.lora_modules
        is_last = bool(modules) or not private.acts_on_states
        return is_last and self.parts.model.layers.keeps_tokens(modules)

    def _unread(
        self, num_users: int, stacked: Tensors, parts: Parts | None, candidates: np.ndarray | None
    ) -> np.ndarray:
        """Scores of users of whom no item is known: user vectors of zeros."""
        model = self.parts.model
        vector = torch.zeros(1, model.item_texts.shape[1], device=model.item_texts.device)
        scores = model.score_vectors([vector] * num_users, stacked, parts or Parts()).cpu().numpy()
        if scores.shape[1] > 1 and not np.ptp(scores, axis=1).all():
            raise DataError(
                "an empty history, and the model has no item biases to rank by; give an item, or "
                "train with head.item_bias (and where all items are new to the model, with "
                "head.item_dropout or head.item_ids: codes)"
            )
        return scores if candidates is None else scores[:, candidates]


def _kind(user: Served) -> tuple[bool, bool, bool]:
    """Users of one kind are served in one pass."""
    is_kept = user.kept is not None and user.kept.hidden is not None
    return user.private is not None, len(user.history) > 0, is_kept
