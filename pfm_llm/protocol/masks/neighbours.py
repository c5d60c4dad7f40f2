"""Who masks with whom.

A stream for each pair of a large cohort would cost half of what the training does. So a client
masks with some neighbours only (Bell et al. 2020, eprint.iacr.org/2020/704). All stand in a circle,
in an order that a digest of everybody's new keys gives. A client's neighbours are those at distance
1 and at some other distances, which follow from the digest too. Everybody computes the same graph.

The sum of a group of clients comes out by itself if nobody of it has a neighbour outside who is
left and honest. Let g of n clients be gone or collude with the server. The chance that one of the
others has no neighbour left among them is at most

    (n - g) C(g, k) / C(n - 1, k)

with k neighbours, for clients that the graph does not depend on; larger groups come out far less
often. `usual_number` keeps that below 2^-8 where a third is gone and a tenth colludes; with 64
clients it is then below 2^-15 where a fifth is gone and a tenth colludes. `reaches` is what clients
check before they let the server take masks off. So a graph that dropouts alone cut in two, real
ones or such that the server claims, costs the round and tells nothing. A server with colluding
clients could claim that the honest neighbours of one client are gone: only if all mask with all,
nothing is to be had by that.
"""

import functools
import math
from collections.abc import Collection, Mapping

from pfm_llm.protocol.masks.agreement import digest

Graph = Mapping[str, frozenset[str]]
"""Client to its neighbours."""


_FEWEST = 10
_RISK = 2.0**-8


def usual_number(cohort_size: int) -> int:
    """The number of neighbours that is enough for a cohort, and at least 10."""
    gone = cohort_size // 3 + cohort_size // 10

    def risk(number: int) -> float:
        ways = math.comb(gone, number) / math.comb(cohort_size - 1, number)
        return (cohort_size - gone) * ways

    number = _FEWEST
    while number < cohort_size - 1 and risk(number) > _RISK:
        number += 2
    return number


@functools.lru_cache(maxsize=4)
def mask_graph(client_ids: tuple[str, ...], num_neighbours: int, beacon: bytes) -> Graph:
    """The neighbours of every client: ``num_neighbours``, one more if odd, or all others.

    The newest graphs are kept, as in one process all clients of a cohort ask for the same.

    Args:
        client_ids: Different ids; their order does not matter.
        num_neighbours: At least 2.
        beacon: Bytes that nobody can choose.
    """
    count = len(client_ids)
    everybody = frozenset(client_ids)
    if num_neighbours >= count - 1:
        return {client_id: everybody - {client_id} for client_id in client_ids}
    circle = sorted(client_ids, key=lambda client_id: digest("place", beacon, client_id))
    others = sorted(range(2, (count + 1) // 2), key=lambda n: digest("step", beacon, str(n)))
    steps = [1, *others[: (num_neighbours + 1) // 2 - 1]]
    return {
        client_id: frozenset(circle[(place + step) % count] for s in steps for step in (s, -s))
        for place, client_id in enumerate(circle)
    }


def reaches(graph: Graph, clients: Collection[str], over: Collection[str]) -> bool:
    """Whether masks join all of ``clients``, going on at those of ``over`` alone.

    Args:
        graph: The neighbours of every client.
        clients: Those who are to be reached.
        over: Some of them, at least one: those who are known to take part.
    """
    start = min(over)
    reached, waiting = {start}, [start]
    while waiting:
        new = graph[waiting.pop()].intersection(clients) - reached
        reached |= new
        waiting += new.intersection(over)
    return len(reached) == len(set(clients))
