"""Which clients take part in a round, as a pure function of (seed, round).

Rounds cut consecutive slices from an endless stream of shuffled client lists (*passes*), so
that at any time no client has taken part more than once more often than another. Independent
draws would leave some users out for many rounds. A resumed run needs no random state.
"""

import itertools
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
            is listed twice, or the round is not from 1.
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
    pass_number, offset = divmod((round_number - 1) * cohort_size, num_clients)
    order = _pass_order(num_clients, cohort_size, seed, pass_number)
    picked = order[offset : offset + cohort_size]
    missing = cohort_size - len(picked)
    if missing:
        picked += _without_repeats(_shuffle(num_clients, seed, pass_number + 1), picked, missing)[
            :missing
        ]
    return tuple(clients[index] for index in picked)


def _pass_order(num_clients: int, cohort_size: int, seed: int, pass_number: int) -> list[int]:
    """The order of one pass; it depends on the pass before where a cohort spans both.

    Repeats are moved within the first ``cohort_size`` places only. With at least two cohorts in
    a pass that leaves its end as it was shuffled, so one step back is enough. In shorter passes
    the dependence goes back to the last pass that begins with a new cohort.
    """
    if num_clients >= 2 * cohort_size:
        first = max(pass_number - 1, 0)
    else:
        first = pass_number
        while first * num_clients % cohort_size:
            first -= 1
    order = _shuffle(num_clients, seed, first)
    for number in range(first + 1, pass_number + 1):
        done = number * num_clients % cohort_size  # of the cohort that spans the boundary
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
