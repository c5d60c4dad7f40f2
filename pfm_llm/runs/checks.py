"""What can be known to fail, or to mean little, before a run trains."""

import logging
import shutil
from collections.abc import Sequence

import numpy as np

from pfm_llm.base.errors import DiskSpaceError
from pfm_llm.config.choices import ServerOptimizer
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import like_threshold
from pfm_llm.config.settle import known
from pfm_llm.data.partition import partition, trainable
from pfm_llm.evaluation.baselines.selection import check_baselines
from pfm_llm.evaluation.ranking import check_classes
from pfm_llm.publish import hub
from pfm_llm.runs.run import Corpus, Run
from pfm_llm.server.checkpoint import NUM_KEPT
from pfm_llm.server.participation import select_cohort
from pfm_llm.text.prompts import load_prompt

_log = logging.getLogger(__name__)


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


def check_disk(run: Run) -> None:
    """Check the space for what surely is written: the kept checkpoints, and the adapter.

    Raises:
        DiskSpaceError: There is less space.
    """
    moments = 2 if run.config.federation.server.optimizer is ServerOptimizer.FEDADAM else 1
    # A commit is written before the oldest one is deleted.
    needed = run.model.table.num_bytes * ((1 + moments) * (NUM_KEPT + 1) + 1)
    free = shutil.disk_usage(run.folders.private).free
    if free < needed:
        raise DiskSpaceError(
            f"{run.folders.public} will take at least {needed / 1e6:.0f} MB, and {free / 1e6:.0f} "
            "MB are free there; free some disk space, or set output.dir to a folder on another "
            "disk"
        )


def _warn(ks: Sequence[int], candidates: np.ndarray, what: str) -> None:
    """Warn of each k that is not below the number of candidates, int [users], of some users."""
    for k in ks:
        if num_users := int((candidates <= k).sum()):
            _log.warning(
                "evaluation.ks: among %s, the hit rate@%d of %d of %d users is 1 with any method: "
                "they have no more than %d candidates",
                *(what, k, num_users, len(candidates), k),
            )
