"""The server's checkpoint: the commit point of a run.

A round counts as soon as ``commit.json`` names it. On resume, newer private states are discarded.
``commit.json`` is replaced atomically, after the file of the round is on disk. A process that is
killed at any moment therefore leaves either the old round or the new one, complete.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from pfm_llm.base.errors import CheckpointError, CorruptFileError, StorageError
from pfm_llm.base.files import (
    make_private_dir,
    read_json,
    read_tensors,
    storage_errors,
    write_json,
    write_tensors,
)
from pfm_llm.protocol.types import Tensors

SERVER_FOLDER = "server"
"""The folder of the checkpoints, in the private folder of a run."""
_COMMIT_FILE = "commit.json"
_LEDGER_FILE = "privacy.json"
NUM_KEPT = 2
"""The number of committed rounds that are kept."""


@dataclass(frozen=True)
class RunEnvironment:
    """The conditions under which a resumed run ends with the bits of an uninterrupted one.

    Attributes:
        config_hash: Hash of the settings that results depend on.
        contract_hash: Hash of the update contract (backbone, prompt, catalogue, shapes).
        data_hash: Hash of the interactions.
        torch_version: Such as ``2.13.0+cpu``.
        device: Such as ``cpu (AVX512)``; other instructions round differently.
        threads: Threads of each process.
        num_processes: Number of processes that share the cohort.
        tokens_per_chunk: The bound that defines the chunks.
        population: Name of each node to its number of clients. It is fixed when the run begins:
            cohorts follow from it, and a node that is away later does not change them. Empty where
            all clients are in this process.
    """

    config_hash: str
    contract_hash: str
    data_hash: str
    torch_version: str
    device: str
    threads: int
    num_processes: int
    tokens_per_chunk: int
    population: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def here(
        cls,
        *,
        config_hash: str,
        contract_hash: str,
        data_hash: str,
        num_processes: int,
        tokens_per_chunk: int,
        device: torch.device,
    ) -> Self:
        """The environment of this process, with its torch and threads."""
        kind = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability()
        )
        return cls(
            config_hash=config_hash,
            contract_hash=contract_hash,
            data_hash=data_hash,
            torch_version=str(torch.__version__),
            device=f"{device.type} ({kind})",
            threads=torch.get_num_threads(),
            num_processes=num_processes,
            tokens_per_chunk=tokens_per_chunk,
        )


@dataclass(frozen=True)
class Checkpoint:
    """A committed round.

    Attributes:
        round_number: The round after which it was taken.
        tensors: The saved state of the server.
        environment: The conditions under which the run trained.
    """

    round_number: int
    tensors: dict[str, torch.Tensor]
    environment: RunEnvironment


def check_resumable(saved: RunEnvironment, current: RunEnvironment) -> None:
    """Refuse a resume that could end with other bits.

    Raises:
        CheckpointError: A condition differs; the message names each one with both values.
    """
    differing = [
        f"{field.name} was {getattr(saved, field.name)}, is {getattr(current, field.name)}"
        for field in dataclasses.fields(RunEnvironment)
        if getattr(saved, field.name) != getattr(current, field.name)
    ]
    if differing:
        raise CheckpointError(
            f"this run cannot be resumed here: {'; '.join(differing)}. Restore these conditions, "
            "or start a new run under another name"
        )


class CheckpointStore:
    """The checkpoints of one run, in one folder."""

    def __init__(self, directory: Path) -> None:
        """Open a folder, such as ``runs/<name>.private/server``; the first `save` makes it."""
        self._directory = directory

    @property
    def ledger_path(self) -> Path:
        """The file of the run's ledger of privacy, which no commit and no rollback changes."""
        return self._directory / _LEDGER_FILE

    def rounds(self) -> tuple[int, ...]:
        """The committed rounds that are kept, oldest first; the last is the commit point.

        Raises:
            CorruptFileError: ``commit.json`` is damaged.
        """
        return tuple(self._commits())

    def save(self, round_number: int, tensors: Tensors, environment: RunEnvironment) -> None:
        """Commit a round, then delete the rounds that are no longer kept.

        Args:
            round_number: Later than the committed one.
            tensors: The server's state.
            environment: See `check_resumable`.

        Raises:
            CheckpointError: This round or a later one is committed already.
            DiskSpaceError: The disk is full; the commit point is unchanged.
            StorageError: Writing failed; the commit point is unchanged.
        """
        commits = self._commits()
        newest = max(commits, default=-1)
        if round_number <= newest:
            raise CheckpointError(
                f"{self._directory}: round {newest} is committed, so round {round_number} cannot "
                "be; resume from it"
            )
        header = {
            "round": str(round_number),
            "environment": json.dumps(dataclasses.asdict(environment)),
        }
        make_private_dir(self._directory)
        path = self._directory / _file_of(round_number)
        commits[round_number] = write_tensors(path, tensors, header)
        self._publish(dict(list(commits.items())[-NUM_KEPT:]))

    def load(self, round_number: int | None = None) -> Checkpoint | None:
        """Read the commit point, or an older round that is kept.

        Args:
            round_number: None: the newest.

        Returns:
            The checkpoint; None if no round was committed and none was asked for.

        Raises:
            CheckpointError: The round is not kept, or was written by another version.
            CorruptFileError: A file is damaged or missing; the message says how to go on.
        """
        commits = self._commits()
        if round_number is None:
            return self._read(max(commits), commits) if commits else None
        if round_number not in commits:
            raise CheckpointError(
                f"{self._directory}: round {round_number} is not kept; "
                f"kept rounds: {', '.join(map(str, commits)) or 'none'}"
            )
        return self._read(round_number, commits)

    def rollback(self, round_number: int) -> None:
        """Make an older kept round the commit point and delete the later rounds.

        The caller must discard private states that are newer than the round.

        Raises:
            CheckpointError: The round is not kept.
            CorruptFileError: Its file is damaged; nothing was changed.
        """
        self.load(round_number)
        self._publish({n: sha256 for n, sha256 in self._commits().items() if n <= round_number})

    def _publish(self, commits: Mapping[int, str]) -> None:
        entries = [
            {"round": number, "file": _file_of(number), "sha256": sha256}
            for number, sha256 in commits.items()
        ]
        write_json(self._directory / _COMMIT_FILE, {"commits": entries})
        kept = {_COMMIT_FILE, *map(_file_of, commits)}
        with storage_errors(self._directory):
            for path in self._directory.iterdir():
                # Temporary files of a killed save begin with a dot.
                ours = path.name.lstrip(".").startswith(("round_", f"{_COMMIT_FILE}."))
                if ours and path.name not in kept:
                    path.unlink(missing_ok=True)

    def _commits(self) -> dict[int, str]:
        """The kept rounds, oldest first, and the SHA-256 of the file of each."""
        path = self._directory / _COMMIT_FILE
        remedy = "restore it from a backup, or delete the run's folders and start again"
        try:
            entries = [(int(e["round"]), str(e["sha256"])) for e in read_json(path)["commits"]]
        except FileNotFoundError:
            return {}
        except (StorageError, OSError, LookupError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path} is damaged ({error!r}); {remedy}") from error
        rounds = [round_number for round_number, _ in entries]
        if not rounds or rounds != sorted(set(rounds)):
            raise CorruptFileError(f"{path} is damaged (rounds {rounds}); {remedy}")
        return dict(entries)

    def _read(self, round_number: int, commits: Mapping[int, str]) -> Checkpoint:
        path = self._directory / _file_of(round_number)
        try:
            tensors, header = read_tensors(path, commits[round_number])
            if header.get("round", str(round_number)) != str(round_number):
                raise CorruptFileError(f"it holds round {header['round']}")
        except (StorageError, OSError) as error:
            older = [number for number in commits if number < round_number]
            remedy = (
                f"round {older[-1]} is kept, go back to it with --resume --from-round {older[-1]}"
                if older
                else "no older round is kept: start the run again"
            )
            raise CorruptFileError(
                f"the checkpoint of round {round_number}, {path}, is damaged or missing "
                f"({error}); {remedy}"
            ) from error
        try:
            environment = RunEnvironment(**json.loads(header["environment"]))
            return Checkpoint(round_number, tensors, environment)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} was written by another version of pfm_llm ({error!r}); resume with "
                "that version, or start a new run"
            ) from error


def _file_of(round_number: int) -> str:
    return f"round_{round_number:06d}.safetensors"
