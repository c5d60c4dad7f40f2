"""Run by the tests on one or more processes: sums a round's updates, then tries failing commits.

Usage: ranks_driver.py CONFIG OUT, where OUT is a folder for what each process found.
"""

import errno
import os
import sys
from pathlib import Path

import torch

from pfm_llm.base import files
from pfm_llm.base.errors import PfmError
from pfm_llm.base.processes import start_processes
from pfm_llm.config.schema import load_config
from pfm_llm.federation.rounds import Federation, commit
from pfm_llm.runs.experiment import make_federation
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import assemble, load_corpus


def main(config_file: str, out: Path) -> None:
    config = load_config(config_file)
    processes = start_processes(config.runtime.threads)
    folders = RunFolders.of(out / "run")
    run = assemble(config, load_corpus(config), folders, processes)
    federation = make_federation(run)
    mine = out / f"{processes.index}-of-{processes.count}"
    cohort = federation.server.select_cohort(1)
    chunks = run.clients.trainer.chunks(cohort)
    updates = federation.exchange.train(cohort, federation.server.shared)
    files.write_tensors(mine.with_suffix(".safetensors"), updates.result())
    found = {
        "chunks": len(chunks),
        "own_chunks": len(processes.share(chunks)),
        "num_updates": updates.tally.num_updates,
        "noted": updates.tally.noted,
        "threads": torch.get_num_threads(),
        "disk_full_at_commit": failure_of(federation, where=0),
        "disk_full_at_private_save": failure_of(federation, where=1),
    }
    processes.wait()
    found["rounds_after_failures"] = list(federation.checkpoints.rounds())
    commit(federation, 1)
    found["rounds_after_commit"] = list(federation.checkpoints.rounds())
    files.write_json(mine.with_suffix(".json"), found)


def failure_of(federation: Federation, where: int) -> str:
    """The error that this process sees when the disk of process ``where`` is full."""
    fsync = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if federation.processes.index == where % federation.processes.count:
        os.fsync = full
    try:
        if where == 0:
            commit(federation, 1)
        else:
            cohort = federation.server.select_cohort(1)
            federation.exchange.train(cohort, federation.server.shared)
    except PfmError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.fsync = fsync
    return ""


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
