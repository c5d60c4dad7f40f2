"""The checks of a run before it trains: its plan, its memory, its disk."""

import logging
import shutil
from collections.abc import Sequence

import numpy as np
from torch import nn

from pfm_llm.base.errors import DiskSpaceError
from pfm_llm.base.processes import Processes
from pfm_llm.config.choices import ServerOptimizer
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import like_threshold
from pfm_llm.config.settle import known
from pfm_llm.data.partition import partition, trainable
from pfm_llm.evaluation.baselines.selection import check_baselines
from pfm_llm.evaluation.ranking import check_classes
from pfm_llm.publish import hub
from pfm_llm.runs.checks.memory import (
    BASELINES,
    EVALUATION,
    LOADING,
    TEXTS,
    TRAINING,
    MemoryEstimate,
    estimate_memory,
)
from pfm_llm.runs.checks.process import free_memory, held_memory, shape_of
from pfm_llm.runs.run import BYTES_PER_GB, Corpus, Run
from pfm_llm.server.checkpoint import NUM_KEPT
from pfm_llm.server.participation import select_cohort
from pfm_llm.text.prompts import load_prompt

_log = logging.getLogger(__name__)

_LESS_TEXT = "lower runtime.tokens_per_chunk or federation.local.windows_per_step"
_REMEDIES = {
    LOADING: "choose a smaller backbone.name",
    TEXTS: "choose a smaller backbone.name, or set data.met_items_only: true",
    TRAINING: f"set data.met_items_only: true, {_LESS_TEXT}, or lower federation.cohort_size",
    EVALUATION: "set data.met_items_only: true, or lower runtime.tokens_per_chunk",
    BASELINES: "leave ease out of evaluation.baselines, or set data.met_items_only: true",
}
"""Phase to the settings that lower its memory."""


def check_plan(config: ExperimentConfig, data: Corpus) -> None:
    """Check what a config wants to train, to measure and to publish against its data.

    Args:
        config: A settled config.
        data: Its data.

    Raises:
        ConfigError: The cohort is larger than the number of clients, or a baseline is unknown.
        DataError: The prompt needs a field that the items lack, there are no likes and dislikes
            to tell apart, or a baseline cannot be fitted.
        HubError: The run is to be published, and the repository's name is wrong or nobody is
            logged in.
    """
    load_prompt(config.prompt).check_fields(data.interactions.catalogue)
    clients = partition(data.interactions, config.data.users_per_client, config.seed)
    names = trainable(clients, data.split.train)
    select_cohort(names, known(config.federation.cohort_size), config.seed, 1)
    if (threshold := like_threshold(config)) is not None:
        for split in map(data.split.named, config.evaluation.splits):
            check_classes(split.liked(threshold))
    train = data.split.train.interactions
    check_baselines(config.evaluation.baselines, train.num_users, len(train.catalogue))
    if config.push_to_hub is not None:
        hub.check_login(config.push_to_hub.repo)


def warn_of_easy_figures(config: ExperimentConfig, data: Corpus) -> None:
    """Warn of a k that reaches the end of the ranked candidates: every method hits there."""
    evaluated, num_items = config.evaluation, len(data.interactions.catalogue)
    for split in map(data.split.named, evaluated.splits):
        unseen = np.array([num_items - len(np.unique(own)) for own in split.histories])
        _warn(evaluated.ks, unseen, f"the items that a user of {split.name} has not met")
        targets = np.array([*map(len, split.targets)])
        sampled = 1 + np.minimum(evaluated.num_negatives, unseen - targets)
        _warn(evaluated.ks, sampled, f"a target of {split.name} and its sampled negatives")


def check_memory(
    config: ExperimentConfig, data: Corpus, processes: Processes
) -> MemoryEstimate | None:
    """Say how much memory a run needs, and warn if that is more than is free.

    Args:
        config: A settled config.
        data: Its data.
        processes: The processes, which are taken to share one machine.

    Returns:
        The estimate of one process; None on a device with memory of its own.

    Raises:
        BackboneError, AssetError: The settings of the language model cannot be read, or do not fit
            the adapters.
    """
    if processes.device.type != "cpu":
        return None
    found = estimate_memory(shape_of(config, data))
    free = free_memory() + processes.count * held_memory()
    needed = processes.count * found.total
    if not processes.is_main:
        return found
    _log.info(
        "This run needs about %s of memory (largest, in %s: %s); %s are free",
        _gb(needed),
        found.phase,
        ", ".join(f"{name} {_gb(size)}" for name, size in list(found.parts.items())[:3]),
        _gb(free),
    )
    if needed > free:
        _log.warning("this run may end for lack of memory; %s", _REMEDIES[found.phase])
    return found


def check_disk(run: Run) -> None:
    """Check the space for what surely is written, and warn if the caches will not fit.

    The kept checkpoints and the adapter are surely written. The run goes on without caches.

    Raises:
        DiskSpaceError: There is less space.
    """
    moments = 2 if run.config.federation.server.optimizer is ServerOptimizer.FEDADAM else 1
    # A commit is written before the oldest one is deleted.
    needed = run.model.table.held_bytes * ((1 + moments) * (NUM_KEPT + 1) + 1)
    free = shutil.disk_usage(run.folders.private).free
    if free < needed:
        raise DiskSpaceError(
            f"{run.folders.public} will take at least {needed / 1e6:.0f} MB, and {free / 1e6:.0f} "
            "MB are free there; free some disk space, or set output.dir to a folder on another "
            "disk"
        )
    cached = run.clients.cache.root
    free = shutil.disk_usage(cached if cached.exists() else run.folders.private).free - needed
    if free < (wanted := _cache_bytes(run)):
        _log.warning(
            "the cache of trunk states will take about %s, and %s are free; when the disk is full, "
            "states are computed each time, which is slower: free some disk space, set cache.dir "
            "to a folder on another disk, or lower cache.max_gb",
            _gb(wanted),
            _gb(max(free, 0)),
        )


def _cache_bytes(run: Run) -> int:
    """Bytes of the trunk states of all windows, about, as far as the cache keeps them."""
    config, split = run.config, run.data.split
    if not isinstance(run.model.trunk, nn.Module):  # states of items, or none at all
        return 0
    window, backbone = config.window, run.model.backbone
    lengths = np.diff(split.train.interactions.offsets)
    most = window.items * window.max_windows if window.max_windows else lengths.max()
    num_items = int(np.minimum(lengths, most).sum())
    for name in config.evaluation.splits:
        num_items += sum(min(len(own), window.items) for own in split.named(name).histories)
    of_item = run.model.encoder.mean_tokens * backbone.hidden_size * backbone.dtype.itemsize
    return min(int(num_items * of_item), int(config.cache.max_gb * BYTES_PER_GB))


def _gb(size: int) -> str:
    return f"{size / BYTES_PER_GB:.2g} GB"


def _warn(ks: Sequence[int], candidates: np.ndarray, what: str) -> None:
    """Warn of each k that is not below the number of candidates, int [users], of some users."""
    for k in ks:
        if num_users := int((candidates <= k).sum()):
            _log.warning(
                "evaluation.ks: among %s, the hit rate@%d of %d of %d users is 1 with any method: "
                "they have no more than %d candidates",
                *(what, k, num_users, len(candidates), k),
            )
