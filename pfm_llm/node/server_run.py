"""A run of a server whose clients are at nodes: rounds, figures, the exported adapter.

It imports no engine: whatever `Link` reaches the nodes will do.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfm_llm.base import files
from pfm_llm.base.errors import ConfigError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes, start_processes
from pfm_llm.config.choices import HeldOutSplit, Task
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.config.schema import ExperimentConfig, dump_config
from pfm_llm.config.settle import known
from pfm_llm.data.interactions import Catalogue
from pfm_llm.data.sources import load_catalogue
from pfm_llm.evaluation import tables
from pfm_llm.evaluation.results import FULL, ResultRow, write_results
from pfm_llm.federation.figures import (
    FederatedFigure,
    count_items,
    evaluate_nodes,
    evaluation_of,
)
from pfm_llm.federation.members import Link
from pfm_llm.federation.nodes import NodesOptions, federation_of_nodes
from pfm_llm.federation.privacy import spent_of
from pfm_llm.federation.rounds import Federation, resume_from, run_rounds
from pfm_llm.federation.server_side import ServerSide, assemble_server
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.publish.export import Exported, export_shared_adapter
from pfm_llm.runs import summary
from pfm_llm.runs.environment import environment
from pfm_llm.runs.folders import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    RunFolders,
)
from pfm_llm.server.checkpoint import CheckpointStore

_log = logging.getLogger(__name__)
_MODES = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)
DIFFERENCES = "differences"
"""Key of ``results.json``: means of paired differences over users."""


def run_server(
    config: ExperimentConfig,
    link: Link,
    options: NodesOptions | None = None,
    resume: bool = False,
) -> Path:
    """Train with the clients of nodes, measure on them, and export the shared adapter.

    The run's folders are those of `RunFolders`; the private one has the server's checkpoints.

    Args:
        config: The experiment. ``data.items`` is the public file of items; no interaction is read.
        link: Reaches the nodes.
        options: How rounds go; None: the defaults.
        resume: Go on with the run of the config's name from its last commit.

    Returns:
        The run's public folder.

    Raises:
        PfmError: Any error with a clear message; committed rounds are intact.
    """
    if config.data.items is None:
        raise ConfigError("data.items is missing; name the public file of items of all nodes")
    processes = start_processes(config.runtime.threads)
    claim = RunFolders.to_resume(config) if resume else RunFolders.claimed(config)
    with processes.main_holds(claim) as folders:
        catalogue = load_catalogue(config.data.items, config.data.columns)
        side = assemble_server(config, catalogue, processes.device)
        federation = federation_of_nodes(
            side,
            link,
            CheckpointStore(folders.server),
            MetricsLog(folders.public / METRICS_FILE),
            processes,
            options or NodesOptions(),
        )
        if resume:
            folders.check_settings(federation.config)
        else:
            _write_start(federation, side, folders, processes)
        first_round = resume_from(federation) if resume else 1
        run_rounds(federation, first_round, lambda: _validate(federation, side, link))
        _report(federation, side, link, folders, catalogue)
        _log.info("%s is complete", folders.public)
    return folders.public


def _write_start(
    federation: Federation, side: ServerSide, folders: RunFolders, processes: Processes
) -> None:
    config = federation.config.model_copy(update={"name": folders.public.name})
    files.write_text(folders.public / CONFIG_FILE, dump_config(config))
    here = environment(
        seed=config.seed,
        dtype=side.dtype,
        threads=processes.threads,
        num_processes=processes.count,
        device=processes.device.type,
    )
    population = federation.environment.population
    here |= {"nodes": dict(population), "num_clients": sum(population.values())}
    files.write_json(folders.public / ENVIRONMENT_FILE, here)


def _validate(federation: Federation, side: ServerSide, link: Link) -> dict[str, dict[str, float]]:
    """Figures of the modes on the validation split; empty where every node withholds them."""
    k = headline_k(federation.config.evaluation.ks)
    request = evaluation_of(side, HeldOutSplit.VALIDATION.value, _MODES, (k,))
    found = evaluate_nodes(side, link, federation.server.shared, request)
    modes = dict.fromkeys(one.name for one in found if one.name in list(Mode))
    return {
        mode: {f"{one.metric}@{one.k}": one.value for one in found if one.name == mode}
        for mode in modes
    }


def _report(
    federation: Federation, side: ServerSide, link: Link, folders: RunFolders, items: Catalogue
) -> None:
    """Measure on the nodes, write the results, and export the adapter."""
    config, shared = federation.config, federation.server.shared
    counts = count_items(side, link)
    rows: list[ResultRow] = []
    differences: dict[str, list[dict[str, Any]]] = {}
    for split in config.evaluation.splits:
        request = evaluation_of(side, split.value, _MODES, config.evaluation.ks)
        found = evaluate_nodes(side, link, shared, request, counts)
        rows += _rows(config, split.value, shared, found)
        paired = [dataclasses.asdict(one) for one in found if "-" in one.name]
        differences[split.value] = paired
    if not rows:
        _log.warning("every node withholds its figures: the run has no results")
    spent = spent_of(federation.server, federation.checkpoints)
    extra: Mapping[str, Any] = {
        DIFFERENCES: differences,
        "config": config.model_dump(mode="json"),
        "environment": files.read_json(folders.public / ENVIRONMENT_FILE),
        **summary.as_entry(spent),
    }
    write_results(folders.public / RESULTS_FILE, rows, extra)
    evaluated = config.evaluation
    texts = [
        tables.results_table(rows, split.value, evaluated.confidence, evaluated.ks)
        for split in evaluated.splits
    ]
    files.write_text(folders.public / TABLE_FILE, "\n".join(texts))
    exported = Exported(config, side.model, items, privacy=spent)
    export_shared_adapter(exported, folders.shared_adapter, shared, rows)


def _rows(
    config: ExperimentConfig, split: str, shared: SharedState, found: Sequence[FederatedFigure]
) -> list[ResultRow]:
    """The rows of the modes and of popularity; differences are no rows."""
    cohort = known(config.federation.cohort_size)
    rows = []
    for one in found:
        if "-" in one.name:
            continue
        is_mode = one.name in list(Mode)
        rows.append(
            ResultRow(
                method=config.method.value if is_mode else one.name,
                mode=one.name if is_mode else Mode.NONE.value,
                task=Task.NEXT_ITEM.value,
                protocol=config.data.split.value,
                budget=f"{shared.round_number} rounds x {cohort} clients" if is_mode else "counts",
                split=split,
                candidates=FULL,
                metric=one.metric,
                k=one.k,
                value=one.value,
                ci_low=one.ci_low,
                ci_high=one.ci_high,
                num_users=one.num_users,
                seed=config.seed,
                regime=(config.regime or "") if is_mode else "",
            )
        )
    return rows
