"""The folders of a run, and the search for a run by name.

``runs/<name>/`` holds ``config.yaml``, ``environment.json``, ``metrics.jsonl`` (see
`metrics_log`), ``results.json``, ``results.md``, ``plots/*.png`` (see `plots`) and the exported
adapter. It may be shown to anybody. ``runs/<name>.private/`` holds the private data of the clients,
and the server's checkpoints: the optimiser's moments tell which items the last cohorts met.

A process that works on a run holds the lock ``runs/<name>.private/run.lock``.
"""

import contextlib
import difflib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base.errors import BusyError, CheckpointError, ConfigError
from pfm_llm.base.files import make_private_dir
from pfm_llm.base.locks import locked
from pfm_llm.config.earlier import load_saved
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import changed_settings
from pfm_llm.config.settle import settle_like
from pfm_llm.server.checkpoint import SERVER_FOLDER

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"

_LOCK = "run.lock"
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
        return self.private / SERVER_FOLDER

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
    @contextlib.contextmanager
    def claimed(cls, config: ExperimentConfig) -> Iterator["RunFolders"]:
        """The folders of a new run, locked during the block; no other start can get them.

        They are those of ``<name>``, or of the next ``<name>-<n>`` that is free. If the block fails
        before the run has begun, that is before it has an `ENVIRONMENT_FILE`, they are deleted,
        with the folders above them that were made for them.

        Raises:
            StorageError: The folders cannot be made.
        """
        base = Path(config.output.dir) / config.name
        missing = [folder for folder in base.parents if not folder.exists()]
        with contextlib.ExitStack() as stack:
            for number in itertools.count(1):
                folders = cls.of(base if number == 1 else base.with_name(f"{base.name}-{number}"))
                if not folders._are_taken():
                    with contextlib.suppress(BusyError):
                        stack.enter_context(folders.in_work())
                        if not folders._are_taken():
                            break
                        stack.close()  # another run has begun and ended since
            try:
                yield folders
            except BaseException:
                if not (folders.public / ENVIRONMENT_FILE).exists():
                    folders._discard(missing)
                raise

    @classmethod
    @contextlib.contextmanager
    def to_resume(cls, config: ExperimentConfig) -> Iterator["RunFolders"]:
        """The folders of the run ``<name>``, locked during the block.

        Raises:
            ConfigError: There is no such run.
            BusyError: Another process trains or measures it.
        """
        folders = cls.of(Path(config.output.dir) / config.name)
        if not (folders.public / CONFIG_FILE).is_file():
            raise ConfigError(f"no run at {folders.public} to resume; start it without --resume")
        with folders.in_work():
            yield folders

    def check_settings(self, config: ExperimentConfig) -> None:
        """Check that the run was started with the given settings.

        Args:
            config: A config. Settings without a value, which follow from the data, may differ.

        Raises:
            CheckpointError: A setting that training depends on differs.
        """
        saved = load_saved(self.public / CONFIG_FILE)
        changed = changed_settings(saved, settle_like(config, saved))
        if changed:
            raise CheckpointError(
                f"{self.public} cannot be resumed with other settings: {'; '.join(changed)}. "
                "Restore them, or start a new run without --resume"
            )

    def check_layout(self) -> None:
        """Refuse a run of version 0.2, which kept the server's checkpoints in the public folder.

        Raises:
            CheckpointError: It is such a run; the message says how to mend it.
        """
        former = self.public / SERVER_FOLDER
        if former.exists() and not self.server.exists():
            raise CheckpointError(
                f"{former} belongs into the run's private folder, since the checkpoints tell which "
                f"items the last clients met; move it: mv {former} {self.server}"
            )

    @contextlib.contextmanager
    def in_work(self) -> Iterator[None]:
        """Lock the run during the block, which trains or measures it.

        Raises:
            BusyError: Another process trains or measures it.
            StorageError: The lock cannot be made.
            CheckpointError: See `check_layout`.
        """
        self.check_layout()
        make_private_dir(self.private)
        busy = (
            f"another process is working on {self.public}; wait for its end, or stop it, and then "
            "run this again"
        )
        with locked(self.private / _LOCK, busy):
            yield

    def _are_taken(self) -> bool:
        """Whether they have more in them than a start leaves that is killed at its first write."""
        return _holds_files(self.public) or _holds_files(self.private)

    def _discard(self, parents: Sequence[Path]) -> None:
        """Delete both folders, and those of the given folders above them that are empty then."""
        shutil.rmtree(self.public, ignore_errors=True)
        shutil.rmtree(self.private, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in parents:
                folder.rmdir()


def _holds_files(folder: Path) -> bool:
    if not folder.is_dir():
        return folder.exists()
    return any(path.name != _LOCK and not path.name.startswith(".") for path in folder.iterdir())


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
