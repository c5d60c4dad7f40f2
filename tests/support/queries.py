"""Made-up queries of a split."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pfm_llm.data.splits import HeldOut


def held_out_of(
    histories: Sequence[npt.ArrayLike],
    targets: Sequence[npt.ArrayLike],
    name: str = "test",
    users: Sequence[int] | None = None,
) -> HeldOut:
    """One query a user, without ratings; the users are 0, 1, ... unless they are given."""
    return HeldOut(
        name=name,
        users=np.arange(len(targets)) if users is None else np.array(users, np.int64),
        histories=tuple(np.array(history, np.int32) for history in histories),
        history_ratings=None,
        targets=tuple(np.array(wanted, np.int32) for wanted in targets),
        num_dropped=0,
        num_repeated_targets=0,
    )
