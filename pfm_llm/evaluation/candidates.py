"""Candidate sets for the sampled-negatives column of an evaluation.

Ranking a target among a few sampled negatives flatters every method (and not all alike), so
these numbers are reported beside the full ranking, labelled, and only to compare with papers
that give nothing else.

**Nothing here is for training.** Training takes its cross-entropy over all that was not met and
needs no negatives. Whoever samples negatives for training must draw them from the train data
alone: excluding a user's held-out items from them tells the model which items are held out. A
scorer that only counts how often an item was drawn as a user's training negative then finds the
target (the one item never drawn) and reaches a hit rate at 10 of 1.0 without any model.

Evaluation may exclude them, since the model never sees these sets before it is scored. Validation
and test draw from streams of their own, so that nothing chosen on the validation candidates was
fitted to those of the test.
"""

import numpy as np

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.data.splits import HeldOut

PADDING = -1
"""Fills a row of candidates when the catalogue has too few items."""


def sample_negatives(
    held_out: HeldOut, num_items: int, num_negatives: int, seed: int
) -> np.ndarray:
    """Draw the items that each target is ranked against.

    A query's negatives come uniformly from the catalogue without the user's history and without
    any of the query's targets; each target has a draw of its own. They depend on the seed, the
    split's name and the user, not on the other users.

    Args:
        held_out: The queries.
        num_items: Size of the catalogue.
        num_negatives: How many negatives per target.
        seed: The experiment's seed.

    Returns:
        int32 [total number of targets, num_negatives], a row per target: query by query, in the
        order of ``held_out.targets``. Distinct within a row. Where fewer items remain, all that
        remain, then `PADDING`.
    """
    num_targets = sum(map(len, held_out.targets))
    negatives = np.full((num_targets, num_negatives), PADDING, dtype=np.int32)
    row = 0
    for user, history, targets in zip(
        held_out.users, held_out.histories, held_out.targets, strict=True
    ):
        allowed = np.ones(num_items, dtype=bool)
        allowed[history] = False
        allowed[targets] = False
        pool = np.flatnonzero(allowed)
        num_drawn = min(num_negatives, len(pool))
        generator = numpy_generator(seed, f"negatives/{held_out.name}", client=str(user))
        for _ in targets:
            negatives[row, :num_drawn] = generator.choice(pool, num_drawn, replace=False)
            row += 1
    return negatives
