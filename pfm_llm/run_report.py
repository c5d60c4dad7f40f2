"""What a run leaves to be read: its results, their tables, and what it ran on.

``runs/<name>/`` holds ``config.yaml``, ``environment.json``, ``metrics.jsonl`` (see
`metrics_log`), ``results.json``, ``results.md`` and ``plots/*.png`` (see `plots`).
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfm_llm import __version__
from pfm_llm.base.errors import ConfigError, CorruptFileError, DataError
from pfm_llm.base.files import read_json, write_json
from pfm_llm.protocol.types import Mode

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
PLOTS_FOLDER = "plots"

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate")
_GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ResultRow:
    """One measured number and the circumstances that it depends on.

    Attributes:
        method: One of `methods.Method`, or a baseline such as ``popularity``.
        mode: A value of `types.Mode`; ``none`` for a baseline.
        task: What is predicted, such as ``next_item``.
        protocol: How interactions were held out, such as ``leave_last_out``.
        budget: What the method was allowed, in words or figures.
        split: ``validation`` or ``test``.
        candidates: ``full`` (the whole catalogue) or ``sampled<n>`` (n sampled negatives).
        metric: ``ndcg``, ``hit_rate``, ``mrr``, ``auc``, or a measure of `personality`.
        k: The cut-off of the ranked list; 0 where there is none.
        value: Mean over users.
        ci_low: Lower end of the bootstrap interval over users.
        ci_high: Upper end of it.
        num_users: How many users the mean is over.
        seed: The experiment's seed.
        regime: How local training and server shared the work: ``fedsgd``, ``fedavg`` or ``""``.

    Raises:
        DataError: The mode is unknown or a number is not finite.
    """

    method: str
    mode: str
    task: str
    protocol: str
    budget: str
    split: str
    candidates: str
    metric: str
    k: int
    value: float
    ci_low: float
    ci_high: float
    num_users: int
    seed: int
    regime: str = ""

    def __post_init__(self) -> None:
        what = f"result {self.method}/{self.mode} {self.metric}@{self.k}"
        if self.mode not in list(Mode):
            raise DataError(f"{what}: unknown mode; valid: {', '.join(Mode)}")
        if not all(map(math.isfinite, (self.value, self.ci_low, self.ci_high))):
            raise DataError(
                f"{what}: {self.value} [{self.ci_low}, {self.ci_high}] over {self.num_users} "
                "users is not finite; evaluate at least one user"
            )


def write_results(path: Path, rows: Sequence[ResultRow], extra: Mapping[str, Any]) -> None:
    """Write ``results.json``.

    Args:
        path: The file.
        rows: The measured numbers.
        extra: Further top-level keys in plain JSON types: ``config``, ``environment``, ``costs``.

    Raises:
        DataError: ``extra`` holds ``rows``, or a value that JSON has no form for, such as NaN.
        StorageError: The file cannot be written.
    """
    if "rows" in extra:
        raise DataError(f"{path}: 'rows' is taken by the results; name the extra key otherwise")
    try:
        write_json(path, {"rows": [dataclasses.asdict(row) for row in rows], **extra})
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: rows, config, environment or costs: {error}") from error


def read_results(path: Path) -> tuple[list[ResultRow], dict[str, Any]]:
    """Read ``results.json`` back: its rows, and its other top-level keys.

    Raises:
        DataError: There is no such file.
        CorruptFileError: The file is not what `write_results` writes.
    """
    if not path.is_file():
        raise DataError(f"no results at {path}; run scripts/evaluate.py first")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise CorruptFileError(f"{path} holds no list of rows; run scripts/evaluate.py again")
    rows = [_parse_row(row, f"{path}, row {n}") for n, row in enumerate(content.pop("rows"), 1)]
    return rows, content


def newest_run(output_dir: str | Path) -> Path:
    """The run in ``output_dir`` that was started or resumed last.

    Args:
        output_dir: The folder of runs. Private folders (``<name>.private``) are passed over.

    Raises:
        ConfigError: There is no run.
    """
    runs = [
        file.parent
        for file in Path(output_dir).glob(f"*/{CONFIG_FILE}")
        if not file.parent.name.endswith(".private")
    ]
    if not runs:
        raise ConfigError(f"no run in {output_dir}; run scripts/fed_train.py first")
    return max(runs, key=lambda folder: (_started_ns(folder), folder.name))


def environment(
    *, seed: int, dtype: str, threads: int, num_processes: int, device: str = "cpu"
) -> dict[str, Any]:
    """What a run ran on, in plain JSON types; no host name, user name or path.

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
            **{package: _version(package) for package in _PACKAGES},
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


def _parse_row(row: Any, where: str) -> ResultRow:
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ResultRow)}
    if isinstance(row, dict):
        row = {"regime": "", **row}  # files from before there were regimes
    if not isinstance(row, dict) or row.keys() != fields.keys():
        raise CorruptFileError(f"{where}: expected the keys {', '.join(fields)}")
    for name, kind in fields.items():
        valid = (int, float) if kind is float else kind
        if isinstance(row[name], bool) or not isinstance(row[name], valid):
            raise CorruptFileError(f"{where}: {name} is {row[name]!r}")
    try:
        return ResultRow(**row)
    except DataError as error:
        raise CorruptFileError(f"{where}: {error}") from error


def _started_ns(folder: Path) -> int:
    files = (folder / ENVIRONMENT_FILE, folder / CONFIG_FILE)
    return max(file.stat().st_mtime_ns for file in files if file.is_file())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux, or not readable
    return platform.processor() or None


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that tracks ``file``.

    A package installed below somebody's checkout is not of that checkout's commit.
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
