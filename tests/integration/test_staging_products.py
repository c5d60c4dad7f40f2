"""A folder from which somebody could divide a user's private LoRA is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pfm_llm.base.errors import CorruptFileError, PrivateLeakError
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.model.private.hyper_lora import LORA
from pfm_llm.protocol.types import PrivateState
from pfm_llm.publish import staging
from pfm_llm.publish.artefact import BASIS_FILE, HEAD_FILE, MANIFEST_FILE, TRAINING_CONFIG_FILE
from pfm_llm.publish.staging import stage
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from tests.support.exports import (
    a_private_state,
    change_tensors,
    change_yaml,
    copy_of,
    exported,
    in_a_plot,
    numbers_as,
    private,
    put_into,
    seal,
)
from tests.support.tiny import Tiny

__all__ = ["exported", "private"]
RANK, ALPHA, WEIGHT = 16, 24, 0.7
SCALE = ALPHA / RANK


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose private part is a LoRA that is read off the history."""
    settings = {"kind": "hyper_lora", "rank": RANK, "alpha": ALPHA, "weight": WEIGHT}
    return run_experiment(
        tiny.config(
            tmp_path_factory.mktemp("products"),
            method="pfm",
            **{f"adapters__private__{key}": value for key, value in settings.items()},
        )
    )


def coefficients(private: Path) -> tuple[str, torch.Tensor]:
    """A module, and a user's coefficients for it."""
    tensors = a_private_state(private).tensors
    name = next(name for name in tensors if name.endswith("down_proj"))
    assert tensors[name].ne(0).all()
    return name.removeprefix("private.hyper_lora."), tensors[name]


def factors(exported: Path, private: Path) -> dict[str, torch.Tensor]:
    """What gives a user's coefficients away, without a number of them."""
    module, own = coefficients(private)
    basis = load_file(exported / BASIS_FILE)
    a, b = basis[f"{LORA}.{module}.A"], basis[f"{LORA}.{module}.B"]
    return {
        "B c": b * own,
        "s B c": SCALE * b * own,
        "as it is served": b * SCALE * own * WEIGHT,
        "c A": own[:, None] * a,
        "s B c A": SCALE * (b * own) @ a,
    }


def in_the_head(folder: Path, content: bytes) -> None:
    change_tensors(folder, HEAD_FILE, lambda t: put_into(t["normaliser.basis"], content))


def as_hex_in_the_config(folder: Path, content: bytes) -> None:
    change_yaml(folder, TRAINING_CONFIG_FILE, lambda tree: tree.update(note=content.hex()))


def test_an_honest_folder_is_staged(exported: Path, private: Path, tmp_path: Path) -> None:
    stage(exported, tmp_path / "staged", private)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "transposed"])
@pytest.mark.parametrize("form", ["B c", "s B c", "as it is served", "c A", "s B c A"])
def test_a_product_in_a_file_is_refused(
    form: str,
    transposed: bool,
    dtype: torch.dtype,
    exported: Path,
    private: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = factors(exported, private)[form]
    in_a_plot(exported, numbers_as(secret.T if transposed else secret, dtype))
    seal(exported)
    with pytest.raises(PrivateLeakError) as caught:
        stage(exported, tmp_path / "staged", private)
    assert "(plots/loss.png of 1 client)" in str(caught.value)
    monkeypatch.setattr(staging, "_products", lambda *_: None)
    stage(exported, tmp_path / "without", private)  # no number of the user's own is in the folder


@pytest.mark.parametrize(
    ("hide", "file"),
    [(in_the_head, HEAD_FILE), (as_hex_in_the_config, TRAINING_CONFIG_FILE)],
)
def test_a_product_is_refused_wherever_it_is(
    hide: Callable[[Path, bytes], None], file: str, exported: Path, private: Path, tmp_path: Path
) -> None:
    hide(exported, numbers_as(factors(exported, private)["s B c"], torch.float32))
    seal(exported)
    with pytest.raises(PrivateLeakError) as caught:
        stage(exported, tmp_path / "staged", private)
    assert f"({file} of 1 client)" in str(caught.value)


@pytest.mark.parametrize("form", ["s B c", "as it is served"])
def test_a_product_in_the_place_of_its_factor_is_refused(
    form: str, exported: Path, private: Path, tmp_path: Path
) -> None:
    """The folder lacks the factor then; the server's checkpoint has it."""
    module, _ = coefficients(private)
    secret = factors(exported, private)[form]
    change_tensors(exported, BASIS_FILE, lambda t: t.update({f"{LORA}.{module}.B": secret}))
    seal(exported)
    with pytest.raises(PrivateLeakError, match=rf"\({BASIS_FILE} of 1 client\)"):
        stage(exported, tmp_path / "staged", private)


def test_a_product_is_found_in_a_folder_that_is_none_of_ours(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    """Files that nobody can read as what they should be do not stop the search."""
    secret = numbers_as(factors(exported, private)["B c"], torch.float32)
    (exported / BASIS_FILE).write_bytes(b"no tensors" + secret)
    seal(exported)
    with pytest.raises(PrivateLeakError, match=rf"\({BASIS_FILE} of 1 client\)"):
        stage(exported, tmp_path / "damaged", private)
    (exported / MANIFEST_FILE).unlink()
    with pytest.raises(PrivateLeakError, match=rf"\({BASIS_FILE} of 1 client\)"):
        stage(exported, tmp_path / "staged", private)


def test_a_damaged_checkpoint_stops_it_since_products_cannot_be_compared(
    exported: Path, run: Path, tmp_path: Path
) -> None:
    private = copy_of(RunFolders.of(run).private, tmp_path / "tiny.private")
    newest = max((private / "server").glob("round_*"))
    newest.write_bytes(newest.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match="checkpoint"):
        stage(exported, tmp_path / "staged", private)


def test_a_store_without_a_server_is_compared_with_the_folders_factors(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    module, own = coefficients(private)
    store = PrivateStore(tmp_path / "x.private")
    store.save(PrivateState("a", 1, {f"private.hyper_lora.{module}": own}))
    stage(exported, tmp_path / "honest", tmp_path / "x.private")
    in_a_plot(exported, numbers_as(factors(exported, private)["s B c"], torch.float32))
    seal(exported)
    with pytest.raises(PrivateLeakError, match="of 1 client"):
        stage(exported, tmp_path / "staged", tmp_path / "x.private")


@pytest.mark.parametrize("scale", [1.0, SCALE, SCALE * WEIGHT])
def test_a_private_factor_is_refused_as_it_is_and_as_it_is_served(
    scale: float, exported: Path, tmp_path: Path
) -> None:
    """As with ``shared_basis``, whose B is private as a whole. A LoRA is served with s B."""
    secret = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    state = PrivateState("a", 1, {"private.lora.layer.B": secret})
    PrivateStore(tmp_path / "x.private").save(state)
    for number, layout in enumerate((secret, secret.T)):
        leaky = copy_of(exported, tmp_path / f"leaky-{number}")
        in_a_plot(leaky, numbers_as(scale * layout, torch.float32))
        seal(leaky)
        with pytest.raises(PrivateLeakError, match=r"plots/loss.png"):
            stage(leaky, tmp_path / f"staged-{number}", tmp_path / "x.private")
