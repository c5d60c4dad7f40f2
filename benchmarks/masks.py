"""Measure rounds under masks beside the same rounds in the clear, on the embedded model and data.

All ways of a round train the same cohort from the same shared state, in turn, round after round:

- clear: updates in the clear;
- masked: under masks, with the usual number of neighbours;
- masked_all_pairs: every client masks with every other;
- clear_dropouts, masked_dropouts: the same with a share of the cohort that vanishes once it has
  shared its secrets.

The time of a round under masks is that of all its clients and the server, one after another, as
that of a round in the clear is. In one process a signature is checked once for all clients;
``client`` and ``server`` in the result say what each spends by itself, with nothing remembered.

    python benchmarks/masks.py
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.base.processes import Processes
    from pfm_llm.federation.exchange import LocalExchange
    from pfm_llm.protocol.types import Tensors
    from pfm_llm.runs.run import Run
    from pfm_llm.server.aggregation import Aggregator
    from pfm_llm.server.masked_round import MaskedRound
    from pfm_llm.server.server import Server

T = TypeVar("T")
CLEAR, MASKED, ALL_PAIRS = "clear", "masked", "masked_all_pairs"
CLEAR_DROPOUTS, MASKED_DROPOUTS = "clear_dropouts", "masked_dropouts"
BESIDE = {MASKED: CLEAR, ALL_PAIRS: CLEAR, MASKED_DROPOUTS: CLEAR_DROPOUTS}
"""A way of a round to the one in the clear with the same clients."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a shipped config, or a file")
    parser.add_argument("--cohort", type=int, default=64, help="clients in a round")
    parser.add_argument("--dropouts", type=float, default=1 / 3, help="share that vanishes")
    parser.add_argument("--norm", type=float, default=4.0, help="bound of an update")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default: results/masks/<name>.json")
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


@dataclass
class Way:
    """One way of a round, and what its rounds took.

    Attributes:
        server: Its server.
        seconds: Of each round, from the clock.
        cpu_seconds: Of each round, of this process's threads.
        mask_seconds: What of a round's seconds went into masks.
        num_summed: Clients in the sum of each round.
        mean: The mean of the newest round.
    """

    server: "Server"
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    mask_seconds: list[float] = field(default_factory=list)
    num_summed: list[int] = field(default_factory=list)
    mean: "Tensors" = field(default_factory=dict)

    def train(self, exchange: "LocalExchange", round_number: int) -> "Aggregator":
        """Train and time a round, from cohort to mean."""
        cohort, shared = self.server.select_cohort(round_number), self.server.broadcast
        started, cpu_started = time.perf_counter(), time.process_time()
        updates = exchange.train(cohort, shared)
        self.mean = updates.result()
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.seconds.append(time.perf_counter() - started)
        self.mask_seconds.append(exchange.diagnostics.get("mask_seconds", 0.0))
        self.num_summed.append(updates.tally.num_updates)
        return updates

    def new_round(self) -> "MaskedRound":
        """A round under masks whose clients have no keys yet."""
        return self.server.new_masked_round({})


def run(arguments: argparse.Namespace) -> None:
    """Set up, race, write the result and print it."""
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.runs.environment import environment

    processes = start_processes(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = assembled(arguments, Path(folder), processes)
        ways = ways_of(run, arguments.dropouts)
        errors = race(run, ways, arguments.rounds)
        result = {
            "rows": [row_of(name, way) for name, way in ways.items()],
            "overhead": {name: overhead(ways[name], ways[clear]) for name, clear in BESIDE.items()},
            "error": errors,
            "bound": bound_of(ways[MASKED]),
            "dropouts": dropouts_of(ways[MASKED_DROPOUTS]),
            "by_itself": by_itself(run, ways[MASKED]),
            "config": described(arguments, run),
            "environment": environment(
                seed=run.config.seed,
                dtype=str(run.model.backbone.dtype).removeprefix("torch."),
                threads=processes.threads,
                num_processes=processes.count,
                device=processes.device.type,
            ),
        }
    out = arguments.out or ROOT / "results" / "masks" / f"{run.config.name}.json"
    files.write_json(out, result)
    print(table(result))


def assembled(arguments: argparse.Namespace, folder: Path, processes: "Processes") -> "Run":
    """The experiment, with the cohort and the clip that all ways share."""
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.runs.folders import RunFolders
    from pfm_llm.runs.run import assemble, load_corpus, settled

    config = load_config(
        find_config(arguments.config),
        [
            f"federation.cohort_size={arguments.cohort}",
            f"federation.stages=[{{clip: {{norm: {arguments.norm}}}}}]",
            f"output.dir={folder}",
        ],
    )
    data = load_corpus(config)
    return assemble(settled(config, data), data, RunFolders.of(folder / "masks"), processes)


def ways_of(run: "Run", dropouts: float) -> dict[str, Way]:
    """The ways, each with a server of its own before round 1."""
    from pfm_llm.config.schema import FederationConfig
    from pfm_llm.server.server import Server

    given = run.config.federation.model_dump(mode="json")
    every = max(8, given["cohort_size"] - 1)
    settings: dict[str, dict[str, Any]] = {
        CLEAR: {},
        MASKED: {"masks": True},
        ALL_PAIRS: {"masks": {"neighbours": every}},
        CLEAR_DROPOUTS: {"simulated_dropouts": dropouts},
        MASKED_DROPOUTS: {"masks": True, "simulated_dropouts": dropouts},
    }
    trainable, seed, model = run.clients.histories.trainable, run.config.seed, run.model
    ways = {}
    for name, own in settings.items():
        config = FederationConfig.model_validate(given | own)
        server = Server(model.table, model.contract, trainable, config, seed, model.shared)
        ways[name] = Way(server)
    return ways


def race(run: "Run", ways: Mapping[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """Train round after round in all ways; the state goes on as in the clear.

    Returns:
        For each way under masks, how its means differ from those in the clear.
    """
    from pfm_llm.base.progress import Progress
    from pfm_llm.federation.exchange import LocalExchange

    clients = run.clients
    found: dict[str, list[dict[str, float]]] = {name: [] for name in BESIDE}
    exchanges = {
        name: LocalExchange(way.server, clients.trainer, clients.store, run.processes)
        for name, way in ways.items()
    }
    with Progress(rounds * len(ways), "racing", unit="rounds") as progress:
        for round_number in range(1, rounds + 1):
            updates = {}
            for name, way in ways.items():
                updates[name] = way.train(exchanges[name], round_number)
                progress.update(1, last=name)
            for masked, clear in BESIDE.items():
                found[masked].append(difference(ways[masked].mean, ways[clear].mean))
            leader = ways[CLEAR].server
            leader.aggregate(updates[CLEAR])
            for way in ways.values():
                way.server.load_state_tensors(leader.state_tensors(), round_number)
    worst = ("largest", "rms")
    return {
        name: {key: max(one[key] for one in rounds_) for key in worst}
        | {"rms_of_mean": statistics.mean(one["rms_of_mean"] for one in rounds_)}
        for name, rounds_ in found.items()
    }


def difference(found: "Tensors", expected: "Tensors") -> dict[str, float]:
    """How two means of a round differ, in the numbers of an update."""
    import torch

    flat = [torch.cat([t.double().flatten() for t in own.values()]) for own in (found, expected)]
    off = flat[0] - flat[1]
    size = math.sqrt(len(off))
    return {
        "largest": float(off.abs().max()),
        "rms": float(off.norm()) / size,
        "rms_of_mean": float(flat[1].norm()) / size,
    }


def row_of(name: str, way: Way) -> dict[str, Any]:
    """What the rounds of a way took."""
    session = way.new_round().session if way.server.is_masked else None
    return {
        "way": name,
        "neighbours": session and min(session.num_neighbours, session.cohort_size - 1),
        "clients_summed": way.num_summed,
        "seconds": way.seconds,
        "cpu_seconds": way.cpu_seconds,
        "mask_seconds": way.mask_seconds,
    }


def overhead(way: Way, clear: Way) -> dict[str, float]:
    """CPU seconds of rounds under masks over those of the same rounds in the clear, less one.

    ``together`` is of all rounds, ``of_fastest`` of the fastest of either, and the others are of
    single rounds. ``share_of_masks`` is what of the seconds went into masks; the rest of a round is
    shorter than in the clear, where the server looks at each update.
    """
    pairs = zip(way.cpu_seconds, clear.cpu_seconds, strict=True)
    extra = [own / other - 1 for own, other in pairs]
    shares = zip(way.mask_seconds, way.seconds, strict=True)
    return {
        "together": sum(way.cpu_seconds) / sum(clear.cpu_seconds) - 1,
        "median": statistics.median(extra),
        "of_fastest": min(way.cpu_seconds) / min(clear.cpu_seconds) - 1,
        "least": min(extra),
        "most": max(extra),
        "share_of_masks": statistics.median(own / whole for own, whole in shares),
    }


def bound_of(way: Way) -> dict[str, float]:
    """The largest error of a number of a mean, as `FixedPoint` states it."""
    fixed_point = way.new_round().fixed_point
    return {"norm": fixed_point.norm, "error": 0.5 / fixed_point.scale}


def dropouts_of(way: Way) -> dict[str, float]:
    """How many clients vanish in a round, and whether the others were summed each time.

    ``survived`` is their share of the cohort, or 0 if a round was lost.
    """
    size = way.new_round().session.cohort_size
    vanished = len(way.server.simulated_dropouts(1))
    lost = sum(number != size - vanished for number in way.num_summed)
    return {
        "clients": size,
        "vanished": vanished,
        "rounds": len(way.num_summed),
        "rounds_lost": lost,
        "survived": 0.0 if lost else vanished / size,
    }


class Clock:
    """Adds up the CPU seconds of those who take part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, whose: str, act: Callable[[], T]) -> T:
        """Do something on somebody's account, with no signature checked before."""
        from pfm_llm.protocol.masks.agreement import is_signed

        is_signed.cache_clear()
        started = time.process_time()
        result = act()
        self.seconds[whose] = self.seconds.get(whose, 0.0) + time.process_time() - started
        return result


def by_itself(run: "Run", way: Way) -> dict[str, Any]:
    """CPU seconds and bytes of one client and of the server, as if each were alone somewhere."""
    from pfm_llm.client.masked_client import MaskedClient
    from pfm_llm.protocol.masks.agreement import Identity
    from pfm_llm.protocol.masks.messages import MaskedUpdate
    from pfm_llm.protocol.masks.shares import SHARE_BYTES
    from pfm_llm.protocol.masks.words import WORD_BYTES

    server, clock = way.server, Clock()
    cohort = server.select_cohort(server.round_under_way)
    identities = {client_id: Identity.generate() for client_id in cohort}
    keys = {c: key.public_key().public_bytes_raw() for c, key in identities.items()}
    masked = server.new_masked_round(keys)
    players = {c: MaskedClient(c, identities[c], masked.session) for c in cohort}
    adverts = [clock.of("client", player.advertise) for player in players.values()]
    roster = clock.of("server", partial(masked.open, adverts))
    sent = {c: clock.of("client", partial(p.share, roster)) for c, p in players.items()}
    received = clock.of("server", partial(masked.deliver, sent))
    shared = server.broadcast
    for client_id, player in players.items():
        train = partial(run.clients.trainer.train_chunk, [client_id], shared)
        [update] = clock.of("training", train)
        words = clock.of("client", partial(masked.fixed_point.encode, update))
        clock.of("client", partial(player.mask, received[client_id], words))
        message = MaskedUpdate(client_id, update.round_number, update.contract_hash, words)
        clock.of("server", partial(masked.add, message))
    left = masked.close()
    signed = {c: clock.of("client", partial(players[c].confirm, left)) for c in left}
    reveals = [clock.of("client", partial(players[c].reveal, signed)) for c in left]
    clock.of("server", partial(masked.unmask, reveals))
    shares = {"client": len(cohort), "training": len(cohort), "server": 1}
    return {
        "cpu_seconds": {whose: own / shares[whose] for whose, own in clock.seconds.items()},
        "bytes": {
            "update_in_the_clear": run.model.table.num_bytes,
            "update_masked": masked.fixed_point.num_words * WORD_BYTES,
            "keys_and_signatures_sent": 2 * len(adverts[0].mask_key + adverts[0].signature),
            "shares_sent": sum(map(len, sent[cohort[0]].values())),
            "shares_revealed": len(left) * SHARE_BYTES,
        },
    }


def described(arguments: argparse.Namespace, run: "Run") -> dict[str, Any]:
    """The settings of the race."""
    return {
        "config": run.config.name,
        "cohort_size": arguments.cohort,
        "dropouts": arguments.dropouts,
        "norm": arguments.norm,
        "rounds": arguments.rounds,
        "numbers": sum(math.prod(spec.shape) for spec in run.model.contract.tensors.values()),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text."""
    lines = [f"{'way':<16} {'neighbours':>10} {'CPU s':>8} {'overhead':>9} {'largest error':>14}"]
    for row in result["rows"]:
        name, seconds = row["way"], statistics.median(row["cpu_seconds"])
        line = f"{name:<16} {row['neighbours'] or '':>10} {seconds:8.2f}"
        if name in BESIDE:
            line += f" {result['overhead'][name]['together']:9.1%}"
            line += f" {result['error'][name]['largest']:14.2e}"
        lines.append(line)
    lost, alone = result["dropouts"], result["by_itself"]["cpu_seconds"]
    lines += [
        f"the largest error that can be: {result['bound']['error']:.2e}",
        f"{lost['vanished']} of {lost['clients']} clients vanished: "
        f"{lost['rounds_lost']} of {lost['rounds']} rounds were lost",
        f"by itself: a client {1e3 * alone['client']:.0f} ms for masks and "
        f"{1e3 * alone['training']:.0f} ms for training, the server {1e3 * alone['server']:.0f} ms",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
