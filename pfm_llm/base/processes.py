"""The processes of a run: one, or several that share each cohort. A thin layer on accelerate.

A wrong launch on CPU often runs without an error and gives misleading results: one process instead
of two, or two unconnected processes that each train every client. Both raise a `LaunchError` here.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object

from pfm_llm.base.errors import ConfigError, LaunchError, PfmError

T = TypeVar("T")

_HOW = (
    "start several CPU processes with: accelerate launch -q --multi_gpu --num_processes 2 "
    "--num_machines 1 --mixed_precision no --dynamo_backend no scripts/fed_train.py … "
    "(or with torchrun --nproc_per_node 2)"
)

_PLAINLY = "start one process with pfm train"
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
_TRUE = {"true", "True", "1"}
_log = logging.getLogger(__name__)


class Processes:
    """This process among those of the run.

    Args:
        accelerator: The accelerator of this process.
        threads: Threads of this process.

    Attributes:
        accelerator: The accelerator, for trackers and the device.
        threads: Threads of this process.
    """

    def __init__(self, accelerator: Accelerator, threads: int) -> None:
        self.accelerator = accelerator
        self.threads = threads

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        """The number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device on which this process computes."""
        return self.accelerator.device

    def share(self, work: Sequence[T]) -> list[tuple[int, T]]:
        """The pieces of work of this process, each with its index in ``work``."""
        return [(i, piece) for i, piece in enumerate(work) if i % self.count == self.index]

    def gather(self, pieces: Sequence[tuple[int, T]]) -> list[T]:
        """Every process's pieces on every process, in the order of their index."""
        gathered = list(gather_object(list(pieces))) if self.count > 1 else list(pieces)
        return [piece for _, piece in sorted(gathered, key=lambda entry: entry[0])]

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_holds(self, context: contextlib.AbstractContextManager[T]) -> Iterator[T]:
        """A block during which the main process holds a context; every process gets its value.

        Raises:
            PfmError: The main process cannot enter the context. Every process raises this.
        """
        with contextlib.ExitStack() as stack:
            with self.together():
                held = [(0, stack.enter_context(context))] if self.is_main else []
            (value,) = self.gather(held)
            yield value

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that every process enters, and that fails on all when it fails on one.

        Otherwise the others would wait at the next exchange for a process that has failed. All
        processes leave the block at the same time.

        Raises:
            PfmError: The error of a process, on every process. A failed process raises its own.
        """
        failure: PfmError | None = None
        try:
            yield
        except PfmError as error:
            failure = error
        failures = self.gather([] if failure is None else [(self.index, failure)])
        if failure or failures:
            raise failure or failures[0]


def start_processes(
    threads: int | None, trackers: Sequence[str] = (), logging_dir: str | None = None
) -> Processes:
    """Join the processes that the launcher started, and set the number of threads.

    Args:
        threads: Threads per process; None: cores divided by the processes on this machine. The
            OMP_NUM_THREADS=1 that ``accelerate launch`` exports on CPU is ignored.
        trackers: Names of accelerate trackers.
        logging_dir: The folder in which trackers write.

    Raises:
        LaunchError: The processes were launched wrongly; the message has a right command.
        ConfigError: A tracker is unknown or not installed.
    """
    check_launch(os.environ)
    check_trackers(trackers)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = _accelerator(trackers, logging_dir)
    if precision != "no" and accelerator.is_main_process:
        _say_ignored(precision)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise LaunchError(
            f"WORLD_SIZE is {asked} but accelerate runs {accelerator.num_processes} process: "
            f"each would train everybody on its own; {_HOW}"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    chosen = threads or max(1, usable_cores() // max(1, local))
    torch.set_num_threads(chosen)
    return Processes(accelerator, chosen)


def _accelerator(trackers: Sequence[str], logging_dir: str | None) -> Accelerator:
    """The accelerator of this process.

    Raises:
        LaunchError: accelerate refuses its settings, or the processes cannot meet.
    """
    try:
        return Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            log_with=list(trackers) or None,
            project_dir=logging_dir,
        )
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise LaunchError(f"accelerate cannot start ({error}); {_PLAINLY}, or {_HOW}") from error


@functools.cache
def _say_ignored(precision: str) -> None:
    """Warn, once a process, of a setting of accelerate that has no effect here."""
    _log.warning(
        "accelerate's mixed_precision: %s is ignored; backbone.dtype of the config decides",
        precision,
    )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate would skip with a warning.

    Raises:
        ConfigError: A tracker is unknown or its package is not installed.
    """
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ConfigError(
                f"runtime.trackers: {name!r} is unknown or not installed; here there are "
                f"{', '.join(available) or 'none'}"
            )


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse a launch that looks like several processes but is one.

    Args:
        environment: The process's environment variables.

    Raises:
        LaunchError: MASTER_ADDR is set without WORLD_SIZE, as ``accelerate launch --cpu
            --num_processes 2`` leaves them; or WORLD_SIZE asks for several processes and there
            is no MASTER_ADDR at which they could meet; or accelerate is to shard the model.
    """
    on = [name for name in _SHARDING if environment.get(f"ACCELERATE_USE_{name}") in _TRUE]
    if on:
        raise LaunchError(
            f"accelerate is set to {', '.join(on)}, by a flag or by the default config in the home "
            f"folder, but here each process holds the whole model; {_PLAINLY}, or give accelerate "
            "launch a --config_file without this"
        )
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise LaunchError(
            "MASTER_ADDR is set but WORLD_SIZE is not: several processes were asked for and only "
            f"one was started (accelerate launch --cpu --num_processes does this); {_HOW}"
        )
    size = environment.get("WORLD_SIZE", "1")
    if size != "1" and "MASTER_ADDR" not in environment:
        raise LaunchError(
            f"WORLD_SIZE is {size} but MASTER_ADDR is not set: this process cannot meet the "
            f"others; unset WORLD_SIZE to run one process, or {_HOW}"
        )


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def log_to_trackers(processes: Processes, values: Mapping[str, Any], step: int) -> None:
    """Send the numbers of a tree to the trackers, if there are any.

    Args:
        processes: The processes of the run.
        values: Numbers, and mappings of them. Anything else is left out.
        step: The round that the numbers belong to.

    A number of a mapping has a dotted name, such as ``validation.shared_only.ndcg_at_10``: some
    trackers refuse an ``@``.
    """
    processes.accelerator.log(_numbers(values), step=step)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    for key, value in values.items():
        name = prefix + key.replace("@", "_at_")
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{name}.")
        elif isinstance(value, int | float):
            found[name] = value
    return found
