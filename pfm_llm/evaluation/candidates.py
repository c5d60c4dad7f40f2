"""Candidate sets for the sampled-negatives column of an evaluation.

A ranking among a few sampled negatives makes every method look better, and some more than others.
These numbers are therefore labelled and reported beside the full ranking, only for comparison with
papers that report nothing else.

**These candidates are not for training.** The training loss is a cross-entropy over all items
outside the history and needs no negatives. Negatives for training would have to be drawn from the
train data alone. If a user's held-out items were excluded from them, they would reveal the held-out
items: a scorer that counts how often an item was drawn as a negative would find the target, which
is never drawn, and would reach a hit rate at 10 of 1.0 without any model.

The evaluation may exclude held-out items, because the model does not see these sets. Validation and
test have separate random streams, so that a choice on the validation candidates is not fitted to
the test candidates.
"""

import numpy as np

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.data.splits import HeldOut

PADDING = -1
"""Fills a row of candidates if the catalogue has too few items."""


def sample_negatives(
    held_out: HeldOut, num_items: int, num_negatives: int, seed: int
) -> np.ndarray:
    """Draw the items that each target is ranked against.

    The negatives of a query come uniformly from the catalogue without the user's history and
    without any target of the query. Each target has its own draw. The draws depend on the seed, the
    name of the split and the user, not on other users.

    Args:
        held_out: The queries.
        num_items: Size of the catalogue.
        num_negatives: How many negatives per target.
        seed: The experiment's seed.

    Returns:
        int32 [total number of targets, num_negatives], a row per target: query by query, in the
        order of ``held_out.targets``. Items are distinct within a row. If fewer items remain, the
        row has all of them, then `PADDING`.
    """
    num_targets = sum(map(len, held_out.targets))
    negatives = np.full((num_targets, num_negatives), PADDING, dtype=np.int32)
    row = 0
    for user, history, targets in zip(
        held_out.users, held_out.histories, held_out.targets, strict=True
    ):
        pool = np.setdiff1d(np.arange(num_items), np.concatenate([history, targets]))
        num_drawn = min(num_negatives, len(pool))
        generator = numpy_generator(seed, f"negatives/{held_out.name}", client=str(user))
        for _ in targets:
            negatives[row, :num_drawn] = generator.choice(pool, num_drawn, replace=False)
            row += 1
    return negatives
