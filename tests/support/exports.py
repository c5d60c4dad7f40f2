"""Exported folders, changed on purpose, for the tests of what may be published."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pfm_llm.base import files
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.protocol.types import PrivateState
from pfm_llm.publish.artefact import ADAPTER_FILE, MANIFEST_FILE
from pfm_llm.publish.manifest import Manifest
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from tests.support.peft_reference import load_private
from tests.support.tiny import Tiny


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a private state of every client."""
    output = tmp_path_factory.mktemp("publishing") / "runs"
    return run_experiment(tiny.by_tokens.config(output, evaluation__every=2))


@pytest.fixture
def private(run: Path) -> Path:
    return RunFolders.of(run).private


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's export, to be changed."""
    return copy_of(run / "shared_adapter", tmp_path / "exported")


def copy_of(exported: Path, to: Path) -> Path:
    """A copy of an exported folder, to be changed."""
    return Path(shutil.copytree(exported, to))


def manifest_of(folder: Path) -> Manifest:
    """A folder's manifest."""
    return Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes(), str(folder))


def seal(folder: Path, listed: tuple[str, ...] = (), **changes: Any) -> None:
    """Make the manifest fit the folder's files as they are now.

    Args:
        folder: The folder.
        listed: Further files to list.
        changes: Other fields of the manifest.
    """
    manifest = manifest_of(folder)
    names = sorted({*changes.pop("names", manifest.files), *listed})
    hashes = {name: files.sha256_of(folder / name) for name in names}
    changed = manifest.model_copy(update={"files": hashes, **changes})
    (folder / MANIFEST_FILE).write_bytes(changed.to_bytes())


def change_json(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change the tree of a JSON file; ``change`` works in place or returns another."""
    tree = files.read_json(folder / name)
    files.write_json(folder / name, change(tree) or tree)


def change_yaml(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """`change_json` for YAML."""
    tree = yaml.safe_load((folder / name).read_text())
    (folder / name).write_text(yaml.safe_dump(change(tree) or tree))


def change_tensors(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a file in place."""
    tensors = {key: value.clone() for key, value in load_file(folder / name).items()}
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)


def a_private_state(private_root: Path) -> PrivateState:
    """The personalised state of some client."""
    store = PrivateStore(private_root)
    state = store.load_personalised(store.client_ids()[-1])
    assert state is not None
    return state


def some_b(state: PrivateState) -> torch.Tensor:
    """A private factor B, which is none of its initial zeros."""
    return next(v for name, v in state.tensors.items() if name.endswith("down_proj.B"))


def some_a(state: PrivateState) -> torch.Tensor:
    """A private factor A: a draw of its client. B may be alike after few steps of one size."""
    return next(v for name, v in state.tensors.items() if name.endswith("down_proj.A"))


def numbers_as(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """A tensor's bytes in a dtype."""
    return tensor.to(dtype).reshape(-1).view(torch.uint8).numpy().tobytes()


def put_into(target: torch.Tensor, content: bytes) -> None:
    """Overwrite the end of a tensor's memory."""
    flat = target.view(torch.uint8).reshape(-1)
    flat[-len(content) :] = torch.frombuffer(bytearray(content), dtype=torch.uint8)


def write_private_adapter(folder: Path, state: PrivateState) -> None:
    """A private adapter under the shared adapter's names, as PEFT would write it."""
    tensors = load_file(folder / ADAPTER_FILE)
    for key in tensors:
        module, factor = key.removeprefix("base_model.model.").split(".lora_")
        tensors[key] = state.tensors[f"private.lora.{module}.{factor[0]}"].contiguous()
    save_file(tensors, folder / ADAPTER_FILE, {"format": "pt"})


def save_both_with_peft(run: Any, state: PrivateState, folder: Path) -> None:
    """What `save_pretrained` writes of a model with both adapters unless it is told otherwise."""
    model = run.model.adapter.peft_model()
    run.model.adapter.load_shared(model, run.model.shared.tensors)
    tensors = {**run.model.shared.tensors, **state.tensors}
    load_private(run.model.adapter, model, run.model.private, tensors)
    model.save_pretrained(str(folder))


def state_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_a_plot(folder: Path, content: bytes) -> None:
    """Put something at the end of a plot's bytes."""
    plot = folder / "plots" / "loss.png"
    plot.write_bytes(plot.read_bytes() + b"x" + content)
