"""The cohort of a round, as a pure function of (seed, round).

Rounds cut consecutive slices from an endless stream of shuffled client lists (*passes*). At any
time, the participations of two clients therefore differ by at most one. Independent draws would
leave some users out for many rounds. A resumed run needs no random state.
"""

import itertools
import math
from collections.abc import Sequence

import torch

from pfm_llm.base.errors import ConfigError
from pfm_llm.base.seeding import generator


def select_cohort(
    client_ids: Sequence[str], cohort_size: int, seed: int, round_number: int
) -> tuple[str, ...]:
    """The clients of one round.

    Args:
        client_ids: All clients; their order does not matter.
        cohort_size: How many to select.
        seed: The experiment's seed.
        round_number: The round, from 1.

    Returns:
        ``cohort_size`` different clients, in a fixed order.

    Raises:
        ConfigError: The cohort is larger than the number of clients or smaller than 1, a client
            is listed twice, or the round is below 1.
    """
    clients = sorted(client_ids)
    num_clients = len(clients)
    if len(set(clients)) != num_clients:
        twice = next(a for a, b in itertools.pairwise(clients) if a == b)
        raise ConfigError(f"client {twice!r} is listed twice; client ids must be unique")
    if not 1 <= cohort_size <= num_clients:
        raise ConfigError(
            f"federation.cohort_size is {cohort_size} but there are {num_clients} clients; "
            f"set it between 1 and {num_clients}"
        )
    if round_number < 1:
        raise ConfigError(f"round {round_number} does not exist; rounds are counted from 1")
    # A round begins at place (round - 1) * cohort_size of the stream, a pass has num_clients places
    pass_number, offset = divmod((round_number - 1) * cohort_size, num_clients)
    order = _pass_order(num_clients, cohort_size, seed, pass_number)
    picked = order[offset : offset + cohort_size]
    missing = cohort_size - len(picked)
    if missing:
        # The cohort goes on into the next pass. `_pass_order` moves the same clients to the front
        # of that pass, so the next round continues exactly after them.
        picked += _without_repeats(_shuffle(num_clients, seed, pass_number + 1), picked, missing)[
            :missing
        ]
    return tuple(clients[index] for index in picked)


def simulated_dropouts(
    cohort: Sequence[str], share: float, seed: int, round_number: int
) -> frozenset[str]:
    """The clients of a cohort that do not answer in a simulation.

    Args:
        cohort: The clients that are asked.
        share: Their share, rounded down to whole clients.
        seed: The experiment's seed.
        round_number: The round, from 1.
    """
    order = torch.randperm(len(cohort), generator=generator(seed, "dropouts", round_number))
    count = math.floor(share * len(cohort))
    return frozenset(cohort[int(index)] for index in order[:count])


def _pass_order(num_clients: int, cohort_size: int, seed: int, pass_number: int) -> list[int]:
    """The order of the clients in one pass, int [num_clients].

    It is a shuffle with one correction. When a cohort begins in the pass before and ends in this
    one, the clients of its first part must not be drawn again for its second part.
    """
    # The correction needs the end of the pass before, which may itself depend on its predecessor.
    # A correction moves clients within the first `cohort_size` places only. If a pass holds two
    # cohorts or more, its end is the plain shuffle, and it is enough to start one pass earlier.
    # Otherwise start at the last pass whose first place is also the first place of a cohort.
    if num_clients >= 2 * cohort_size:
        first = max(pass_number - 1, 0)
    else:
        first = pass_number
        while first * num_clients % cohort_size:
            first -= 1
    order = _shuffle(num_clients, seed, first)
    for number in range(first + 1, pass_number + 1):
        # How many places the cohort across the boundary has taken at the end of the pass before.
        done = number * num_clients % cohort_size
        shuffled = _shuffle(num_clients, seed, number)
        before = order[num_clients - done :]
        order = _without_repeats(shuffled, before, cohort_size - done) if done else shuffled
    return order


def _without_repeats(shuffled: list[int], before: list[int], needed: int) -> list[int]:
    """``shuffled`` with its first ``needed`` entries outside ``before`` moved to the front."""
    repeats = set(before)
    front = [index for index in shuffled if index not in repeats][:needed]
    moved = set(front)
    return front + [index for index in shuffled if index not in moved]


def _shuffle(num_clients: int, seed: int, pass_number: int) -> list[int]:
    order = torch.randperm(num_clients, generator=generator(seed, "cohort", pass_number))
    return [int(index) for index in order.tolist()]
