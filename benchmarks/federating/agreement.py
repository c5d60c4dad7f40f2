"""The last round of a federation, computed again by one process that has all data."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from benchmarks.federating.silos import Silos
from pfm_llm.base.processes import start_processes
from pfm_llm.config.schema import parse_config
from pfm_llm.config.settle import settle
from pfm_llm.federation.nodes import slots_of
from pfm_llm.protocol.types import SharedState, Tensors
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import Run, assemble, load_corpus
from pfm_llm.server.aggregation import WeightedMean, update_weight
from pfm_llm.server.checkpoint import CheckpointStore
from pfm_llm.server.server import Server

_FIRST = "first/"


def difference_of_last_round(run: Path, silos: Silos) -> float:
    """How far the aggregated update of the last round is from that of one process.

    The update of the federation is read off Adam's first moments m of its last two commits,
    (m_R - β m_{R-1}) / (1 - β). The one process starts from the state of commit R - 1.

    Args:
        run: The server's run; it has committed each round, and no update was clipped.
        silos: The data, and the nodes' secret order of clients.

    Returns:
        Norm of the difference over the norm of the update of one process.
    """
    folders = RunFolders.of(run)
    store = CheckpointStore(folders.server)
    before, after = (store.load(number) for number in store.rounds())
    assert before is not None
    assert after is not None
    whole = _whole_run(run, silos)
    population = before.environment.population
    model, config = whole.model, settle(whole.config, sum(population.values()))
    server = Server(
        model.table,
        model.contract,
        slots_of(population),
        config.federation,
        config.seed,
        model.shared,
    )
    server.load_state_tensors(before.tensors, before.round_number)
    cohort = server.select_cohort(after.round_number)
    users = _users_of(silos)
    momentum = config.federation.server.momentum
    found = {
        name.removeprefix(_FIRST): (moment - momentum * before.tensors[name]) / (1 - momentum)
        for name, moment in after.tensors.items()
        if name.startswith(_FIRST)
    }
    total = in_one_process(whole, [users[slot] for slot in cohort], server.broadcast)
    expected = total.result()
    return difference({name: found[name] for name in expected}, expected)


def _whole_run(run: Path, silos: Silos) -> Run:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["source"], tree["data"]["items"] = str(silos.everybody), str(silos.items)
    config = parse_config(tree, "the run's config")
    folder = silos.folder / "one-process"
    processes = start_processes(config.runtime.threads)
    return assemble(config, load_corpus(config), RunFolders.of(folder), processes)


def _users_of(silos: Silos) -> dict[str, str]:
    """Slot to client: what only the nodes know."""
    found: dict[str, str] = {}
    for node in silos.nodes:
        [path] = (silos.private(node) / "federations").glob("*/slots.json")
        ids = slots_of({node: len(clients := json.loads(path.read_text()))})
        found |= dict(zip(ids, clients, strict=True))
    return found


def in_one_process(run: Run, clients: Sequence[str], shared: SharedState) -> WeightedMean:
    """The round of some clients of one process. No bound on norms acts on it; one on means may."""
    trainer, total = run.clients.trainer, WeightedMean()
    for chunk in trainer.chunks(clients):
        for update in trainer.train_chunk(chunk, shared):
            weight = update_weight(run.config.federation.server.weighting, update.num_examples)
            total.add(update, weight)
    return total


def difference(one: Tensors, other: Tensors) -> float:
    """Of all numbers together, relative to the norm of the second; both have the same names."""
    assert one.keys() == other.keys()
    own, whole = (torch.cat([t[name].flatten().double() for name in one]) for t in (one, other))
    return float((own - whole).norm() / whole.norm())
