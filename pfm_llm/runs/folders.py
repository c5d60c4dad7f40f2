"""Where a run's files are, and which run is meant.

``runs/<name>/`` holds ``config.yaml``, ``environment.json``, ``metrics.jsonl`` (see
`metrics_log`), ``results.json``, ``results.md``, ``plots/*.png`` (see `plots`), the server's
checkpoints and the exported adapter. What is private is apart, in ``runs/<name>.private/``.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base.errors import CheckpointError, ConfigError
from pfm_llm.config.schema import ExperimentConfig, load_config
from pfm_llm.config.settings import changed_settings

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"


@dataclass(frozen=True)
class RunFolders:
    """Where a run's files are.

    Attributes:
        public: ``<output.dir>/<name>``: may be shown to anybody.
        private: ``<output.dir>/<name>.private``, a folder apart: never leaves this machine.
    """

    public: Path
    private: Path

    @property
    def initial_adapter(self) -> Path:
        """The run's own copy of the published adapter that it started from."""
        return self.public / "initial_adapter"

    @property
    def shared_adapter(self) -> Path:
        """The exported shared adapter."""
        return self.public / "shared_adapter"

    @classmethod
    def of(cls, public: Path) -> "RunFolders":
        """The folders of the run at ``public``."""
        return cls(public, public.with_name(f"{public.name}.private"))

    @classmethod
    def new(cls, config: ExperimentConfig) -> "RunFolders":
        """Folders that do not exist yet: of ``<name>``, or of the next free ``<name>-<n>``."""
        base = Path(config.output.dir) / config.name
        folders, number = cls.of(base), 2
        while _is_taken(folders.public) or folders.private.exists():
            folders = cls.of(base.with_name(f"{config.name}-{number}"))
            number += 1
        return folders

    @classmethod
    def to_resume(cls, config: ExperimentConfig) -> "RunFolders":
        """The folders of the run ``<name>``.

        Raises:
            ConfigError: There is no such run.
        """
        folders = cls.of(Path(config.output.dir) / config.name)
        if not (folders.public / CONFIG_FILE).is_file():
            raise ConfigError(f"no run at {folders.public} to resume; start it without --resume")
        return folders

    def check_settings(self, config: ExperimentConfig) -> None:
        """Make sure that the run was started with the settings at hand.

        Args:
            config: A settled config.

        Raises:
            CheckpointError: A setting that training depends on was another.
        """
        changed = changed_settings(load_config(self.public / CONFIG_FILE), config)
        if changed:
            raise CheckpointError(
                f"{self.public} cannot be resumed with other settings: {'; '.join(changed)}. "
                "Restore them, or start a new run without --resume"
            )

    @contextlib.contextmanager
    def discarded_on_failure(self) -> Iterator[None]:
        """Delete both folders when the block fails, for a run that never began."""
        try:
            yield
        except BaseException:
            shutil.rmtree(self.public, ignore_errors=True)
            shutil.rmtree(self.private, ignore_errors=True)
            raise


def _is_taken(folder: Path) -> bool:
    """Whether a folder holds anything but what a start killed at its first write leaves."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


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
        raise ConfigError(f"no run in {output_dir}; run `pfm train` first")
    return max(runs, key=lambda folder: (_started_ns(folder), folder.name))


def _started_ns(folder: Path) -> int:
    files = (folder / ENVIRONMENT_FILE, folder / CONFIG_FILE)
    return max(file.stat().st_mtime_ns for file in files if file.is_file())
