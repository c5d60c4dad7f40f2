"""New items in a list of k items: a rule that gives them places, stated once.

Nobody has met a new item, so its text alone ranks it, and it rarely reaches a list by itself. Of k
places the rule gives at least ``floor(k * share)`` to new items, the user's best-ranked ones, as
far as there are so many. New items that stand in the list by themselves count. The others take the
places of the lowest items of the list that are not new. The list keeps the order of the scores, so
these new items come last.

The share is by default that of the new items among the candidates: a catalogue without new items is
not affected, and where a tenth of the items is new, one place of ten is theirs. A share of 0
switches the rule off.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pfm_llm.base.errors import ConfigError
from pfm_llm.evaluation import scoring

Ints = npt.NDArray[np.integer]
_EXACT = 1e-9
"""100 * 0.29 is 28.999999999999996 in binary; it stands for 29 places."""


@dataclass(frozen=True)
class NewPlaces:
    """The rule.

    Attributes:
        share: The share of the places that new items have at least, 0 to 1; None: the share of new
            items among the candidates.

    Raises:
        ConfigError: The share is not in [0, 1].
    """

    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(
                f"new_share: {self.share} is no share of a list; give 0 (new items get no places "
                "of their own) to 1, or leave it out"
            )

    def count(self, k: int, num_new: int, num_candidates: int) -> int:
        """How many of k places new items have at least.

        Args:
            k: Length of the list.
            num_new: New items among the candidates.
            num_candidates: Items that may be recommended.
        """
        if self.share is None:
            places = k * num_new // max(1, num_candidates)
        else:
            places = math.floor(k * self.share + _EXACT)
        return min(places, num_new)

    def top_items(
        self, scores: scoring.Scores, seen: Ints, k: int, is_new: np.ndarray
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        """The list that is shown; without new items it is that of `scoring.top_items`.

        Args:
            scores: [items], any float dtype. An item whose score is NaN is never recommended.
            seen: Item ids to leave out.
            k: How many items, at least 0.
            is_new: bool [items].

        Returns:
            Item ids (int64) and their scores, each [min(k, items that are left)], by falling score.

        Raises:
            DataError: ``k`` is negative, or an item id is outside the catalogue.
        """
        if k < 0 or not is_new.any():
            return scoring.top_items(scores, seen, k)
        ranked, values = scoring.top_items(scores, seen, len(is_new))
        new = is_new[ranked]
        num_new = max(self.count(k, int(new.sum()), len(ranked)), int(new[:k].sum()))
        # Of either kind the best ones, in the order of all.
        kept = np.where(new, np.cumsum(new) <= num_new, np.cumsum(~new) <= k - num_new)
        return ranked[kept][:k], values[kept][:k]

    def ranks(self, full: Ints, of_new: Ints, is_new: np.ndarray, shown: Ints, k: int) -> Ints:
        """The places of targets in the lists that are shown, int64 [T]; k + 1: not shown.

        An item that the rule moves into a list has fewer items above it than in the plain ranking.

        Args:
            full: int [T], ranks among all candidates, from 1.
            of_new: int [T], one more than the number of other new candidates that stand above.
            is_new: bool [T], whether the target is new.
            shown: int [T], the number of new items in each list, from `shown`.
            k: Length of the lists.
        """
        num_new, num_old = of_new - ~is_new, full - of_new + ~is_new  # down to the target itself
        of_other = np.where(is_new, np.minimum(num_old, k - shown), np.minimum(num_new, shown))
        places = np.where(is_new, num_new, num_old) + of_other
        is_shown = np.where(is_new, num_new <= shown, num_old <= k - shown)
        return np.where(is_shown, places, k + 1)

    def shown(self, plain: Ints, num_new: Ints, num_candidates: Ints, k: int) -> Ints:
        """The number of new items in each list under the rule, int64 [T].

        Args:
            plain: int [T], new items in the first k of the plain ranking.
            num_new: int [T], new items among the candidates.
            num_candidates: int [T].
            k: Length of the lists.
        """
        pairs = zip(num_new.tolist(), num_candidates.tolist(), strict=True)
        places = np.array([self.count(k, *pair) for pair in pairs], np.int64)
        return np.maximum(places, plain)
