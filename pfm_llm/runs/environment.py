"""The hardware and software of a run."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from pfm_llm import __version__
from pfm_llm.runs.run import Run

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate")
_GIT_TIMEOUT_S = 5.0


def environment_of(run: Run) -> dict[str, Any]:
    """`environment` with the seed, the dtype and the processes of a run."""
    return environment(
        seed=run.config.seed,
        dtype=str(run.model.backbone.dtype).removeprefix("torch."),
        threads=run.processes.threads,
        num_processes=run.processes.count,
        device=run.processes.device.type,
    )


def environment(
    *, seed: int, dtype: str, threads: int, num_processes: int, device: str = "cpu"
) -> dict[str, Any]:
    """The hardware and software of a run, in plain JSON types; no host name, user name or path.

    Args:
        seed: The experiment's seed.
        dtype: Resolved compute dtype of the backbone, such as ``bfloat16``.
        threads: Threads of each process.
        num_processes: Processes of the run.
        device: Type of the device that computes.

    Returns:
        Versions, machine, launch settings and, when the code is a git checkout, its commit and
        whether tracked files differ from it (``git: null`` otherwise).
    """
    return {
        "versions": {
            "python": platform.python_version(),
            "pfm_llm": __version__,
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "num_processes": num_processes,
        "seed": seed,
        "git": _git_state(Path(__file__).resolve()),
    }


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):  # not Linux, or not readable
        if found := re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1].strip()
    return platform.processor() or None


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that tracks ``file``.

    A package that is installed below another checkout does not belong to its commit.
    """
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file, "rev-parse", "HEAD")
    changes = _git(file, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(file: Path, *arguments: str) -> str | None:
    # Variables such as GIT_DIR, set inside a hook, would point to another checkout.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            env=variables | {"GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
