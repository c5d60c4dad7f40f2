"""The folders of a run, and the search for a run by name.

``runs/<name>/`` holds ``config.yaml``, ``environment.json``, ``metrics.jsonl`` (see
`metrics_log`), ``results.json``, ``results.md``, ``plots/*.png`` (see `plots`), the server's
checkpoints and the exported adapter. Private data is separate, in ``runs/<name>.private/``.
"""

import contextlib
import difflib
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

_MOST_NAMED = 10
_TRAIN_FIRST = "run `pfm train` first"


@dataclass(frozen=True)
class RunFolders:
    """The two folders of a run.

    Attributes:
        public: ``<output.dir>/<name>``; it may be shared.
        private: ``<output.dir>/<name>.private``; it never leaves this machine.
    """

    public: Path
    private: Path

    @property
    def initial_adapter(self) -> Path:
        """The run's own copy of the published adapter that it started from."""
        return self.public / "initial_adapter"

    @property
    def server(self) -> Path:
        """The server's checkpoints."""
        return self.public / "server"

    @property
    def shared_adapter(self) -> Path:
        """The exported shared adapter."""
        return self.public / "shared_adapter"

    @property
    def ranked(self) -> Path:
        """The ranked lists of an evaluation, which are its users'."""
        return self.private / "ranked"

    @classmethod
    def of(cls, public: Path) -> "RunFolders":
        """The folders of the run at ``public``."""
        return cls(public, public.with_name(f"{public.name}.private"))

    @classmethod
    def new(cls, config: ExperimentConfig) -> "RunFolders":
        """Folders that do not exist yet: for ``<name>``, or for the next free ``<name>-<n>``."""
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
        """Check that the run was started with the given settings.

        Args:
            config: A settled config.

        Raises:
            CheckpointError: A setting that training depends on differs.
        """
        changed = changed_settings(load_config(self.public / CONFIG_FILE), config)
        if changed:
            raise CheckpointError(
                f"{self.public} cannot be resumed with other settings: {'; '.join(changed)}. "
                "Restore them, or start a new run without --resume"
            )

    @contextlib.contextmanager
    def discarded_on_failure(self) -> Iterator[None]:
        """Delete both folders if the block fails, for a run that has not begun."""
        try:
            yield
        except BaseException:
            shutil.rmtree(self.public, ignore_errors=True)
            shutil.rmtree(self.private, ignore_errors=True)
            raise


def _is_taken(folder: Path) -> bool:
    """Whether a folder has more in it than a start leaves that is killed at its first write."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def find_run(name_or_path: str | Path | None, runs_dir: str | Path = "runs") -> Path:
    """The folder of a run.

    Args:
        name_or_path: The folder, or its name in ``runs_dir``; None: the run of ``runs_dir`` that
            was started or resumed last.
        runs_dir: The folder of runs.

    Raises:
        ConfigError: There is no such run; the message lists the existing runs.
    """
    runs = _runs_in(Path(runs_dir))
    if name_or_path is None:
        if not runs:
            raise ConfigError(f"no run in {runs_dir}; {_TRAIN_FIRST}")
        return runs[0]
    for folder in (Path(name_or_path), Path(runs_dir) / name_or_path):
        if (folder / CONFIG_FILE).is_file():
            return folder
    what = f"{name_or_path} is no run: it has no {CONFIG_FILE}"
    if not Path(name_or_path).exists():
        what = f"no run at {name_or_path}"
    names = [folder.name for folder in runs]
    if not names:
        raise ConfigError(f"{what}; {runs_dir} has none either; {_TRAIN_FIRST}")
    near = difflib.get_close_matches(Path(name_or_path).name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    listed = ", ".join([*names[:_MOST_NAMED], *(["…"] if len(names) > _MOST_NAMED else [])])
    raise ConfigError(f"{what}; {hint}{runs_dir} has {listed}")


def _runs_in(runs_dir: Path) -> list[Path]:
    """The folders of all runs, without the private ones; the one started last comes first."""
    runs = [
        file.parent
        for file in runs_dir.glob(f"*/{CONFIG_FILE}")
        if not file.parent.name.endswith(".private")
    ]
    return sorted(runs, key=lambda folder: (_started_ns(folder), folder.name), reverse=True)


def _started_ns(folder: Path) -> int:
    files = (folder / ENVIRONMENT_FILE, folder / CONFIG_FILE)
    return max(file.stat().st_mtime_ns for file in files if file.is_file())
