"""Private tensors are found in files: anywhere, in any of the dtypes, from eight numbers on."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import StorageError
from pfm_llm.protocol.types import PrivateState
from pfm_llm.publish.leak_search import DTYPES, RUN, TEXT, Finding, find_private, find_private_in

NAME = "private.lora.layer.B"
DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def state(tensor: torch.Tensor, client_id: str = "user-1", name: str = NAME) -> PrivateState:
    return PrivateState(client_id, 3, {name: tensor})


def raw(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    return tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def forms(content: bytes, tensor: torch.Tensor) -> set[str]:
    """In which forms one tensor is in one content."""
    found = find_private_in({"file": content}, [state(tensor)])
    assert all(hit.file == "file" and hit.tensor == NAME for hit in found)
    return {hit.dtype for hit in found}


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_any_eight_numbers_in_a_row_are_found_at_any_offset(dtype: torch.dtype) -> None:
    tensor = random_tensor(6, 9)
    name = str(dtype).removeprefix("torch.")
    flat = tensor.reshape(-1)
    for first in range(len(flat) - RUN + 1):
        stretch = raw(flat[first : first + RUN], dtype)
        content = noise(37 + first, first) + stretch + noise(first)
        assert forms(content, tensor) == {name}, first


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_seven_numbers_in_a_row_are_not_enough(dtype: torch.dtype) -> None:
    tensor = random_tensor(6, 9)
    flat = tensor.reshape(-1)
    for first in range(len(flat) - RUN + 1):
        content = noise(40) + raw(flat[first : first + RUN - 1], dtype) + noise(40, 1)
        assert forms(content, tensor) == set()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_a_transposed_copy_is_found(dtype: torch.dtype) -> None:
    tensor = random_tensor(12, 10)
    for column in range(10):
        content = raw(tensor[:, column][2:10], dtype)  # nowhere contiguous in the tensor itself
        assert forms(content, tensor) == {str(dtype).removeprefix("torch.")}, column


def test_a_copy_at_the_very_start_or_end_of_a_file_is_found() -> None:
    tensor = random_tensor(RUN)
    assert forms(raw(tensor), tensor) == {"float32"}
    assert forms(noise(99) + raw(tensor), tensor) == {"float32"}
    assert forms(raw(tensor) + noise(99), tensor) == {"float32"}


def test_stretches_do_not_run_from_one_file_into_the_next() -> None:
    tensor = random_tensor(RUN)
    half = len(raw(tensor)) // 2
    contents = {"a": raw(tensor)[:half], "b": raw(tensor)[half:]}
    assert find_private_in(contents, [state(tensor)]) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(6, 8), id="zeros"),
        pytest.param(torch.full((6, 8), 0.02), id="constant"),
        pytest.param(torch.tensor([5e-4, -5e-4] * 24), id="signs of a first step"),
        pytest.param(torch.tensor([0.5, 0.25, 0.125] * 16), id="three values"),
        pytest.param(torch.tensor([0.0, *range(1, 8)] * 6), id="a zero in every eight"),
        pytest.param(torch.tensor([-0.0, *range(1, 8)] * 6), id="a negative zero in every eight"),
    ],
)
def test_zeros_and_stretches_that_hardly_vary_prove_nothing(
    tensor: torch.Tensor, dtype: torch.dtype
) -> None:
    assert forms(noise(11) + raw(tensor, dtype) * 3, tensor) == set()


def test_four_values_in_eight_numbers_are_enough() -> None:
    tensor = torch.tensor([0.5, 0.25, 0.125, 0.3] * 2)
    assert "float32" in forms(raw(tensor), tensor)


def test_who_what_and_where_is_told() -> None:
    states = [
        PrivateState(
            f"user-{n}", 1, {"private.a": random_tensor(4, 8, seed=n), "private.b": torch.ones(3)}
        )
        for n in range(5)
    ]
    states.append(state(random_tensor(9, 9, seed=99), "user-9"))
    contents = {
        "head": noise(50) + raw(states[2].tensors["private.a"]),
        "plots/loss.png": raw(states[4].tensors["private.a"], torch.bfloat16)
        + raw(states[5].tensors[NAME].T),
        "clean": noise(5000),
    }
    assert find_private_in(contents, states) == [
        Finding("head", "user-2", "private.a", "float32"),
        Finding("plots/loss.png", "user-4", "private.a", "bfloat16"),
        Finding("plots/loss.png", "user-9", NAME, "float32"),
    ]


def test_each_tensor_of_a_state_is_told_by_its_own_name() -> None:
    tensors = {
        f"private.{n}": random_tensor(*shape, seed=n)
        for n, shape in enumerate([(3, 8), (8,), (1, 16), (8, 3), (2, 2), (4, 4)])
    }
    for name, tensor in tensors.items():
        found = find_private_in({"f": raw(tensor)}, [PrivateState("user-1", 0, tensors)])
        assert [hit.tensor for hit in found] == ([name] if tensor.numel() >= RUN else [])


@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda t: json.dumps({"x": t.tolist()}), id="json"),
        pytest.param(lambda t: json.dumps(t.tolist(), indent=2), id="json in lines"),
        pytest.param(lambda t: "w:\n" + "".join(f"- {v:.4g}\n" for v in t.reshape(-1)), id="yaml"),
        pytest.param(lambda t: "| " + " | ".join(f"{v:.3e}" for v in t.reshape(-1)), id="table"),
        pytest.param(repr, id="as torch prints it"),
        pytest.param(lambda t: repr(t.numpy()), id="as numpy prints it"),
        pytest.param(lambda t: json.dumps(t.T.tolist()), id="transposed"),
    ],
)
def test_numbers_that_are_spelt_out_are_found(spell) -> None:
    tensor = random_tensor(9, 10) * 50
    content = ("# Notes\n\nversion 2, 17 items\n" + spell(tensor) + "\nend 3.5\n").encode()
    assert forms(content, tensor) == {TEXT}
    assert forms(content, random_tensor(9, 10, seed=1) * 50) == set()


def test_eight_spelt_numbers_are_found_wherever_they_begin() -> None:
    flat = (tensor := random_tensor(5, 7)).reshape(-1)
    for first in range(len(flat) - RUN + 1):
        numbers = flat[first : first + RUN].tolist()
        assert forms(f"0.5, {json.dumps(numbers)}".encode(), tensor) == {TEXT}
        assert forms(json.dumps(numbers[:-1]).encode(), tensor) == set()


def test_spelt_numbers_that_hardly_vary_prove_nothing() -> None:
    tensor = 5e-4 * (1 + 1e-3 * random_tensor(8, 8))
    assert forms(json.dumps([0.0005, 0.000501, 0.000499, 0.0005005] * 4).encode(), tensor) == set()
    assert forms(b"0 1 nan inf 1e999 1e-999 -0.0 .. e5 1e 00" * 9, torch.zeros(9, 9)) == set()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("encode", [bytes.hex, lambda b: base64.b64encode(b).decode()])
def test_bytes_in_hexadecimal_digits_or_base64_are_found(encode, dtype: torch.dtype) -> None:
    tensor = random_tensor(6, 8)
    content = f'{{"blob": "{encode(raw(tensor, dtype))}"}}'.encode()
    assert forms(content, tensor) == {str(dtype).removeprefix("torch.")}


def test_a_folder_is_searched_to_its_depth(tmp_path: Path) -> None:
    tensor = random_tensor(8, 8)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "clean").write_bytes(noise(1000))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "a" / "b" / "file.bin").write_bytes(noise(3) + raw(tensor, torch.float16))
    (hit,) = find_private(tmp_path, [state(tensor)])
    assert hit == Finding("a/b/file.bin", "user-1", NAME, "float16")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*file: Permission denied"):
        find_private(tmp_path, [])


def test_no_files_and_no_states_give_nothing() -> None:
    assert find_private_in({}, [state(random_tensor(8, 8))]) == []
    assert find_private_in({"empty": b"", "zeros": bytes(999)}, [state(random_tensor(8, 8))]) == []
    assert find_private_in({"file": noise(100)}, []) == []
    assert find_private_in({"file": noise(100)}, [PrivateState("user-1", 0, {})]) == []
    assert find_private_in({"file": noise(100)}, [state(random_tensor(3))]) == []


def test_states_stream_through_one_at_a_time() -> None:
    alive: list[int] = []

    def states() -> Iterator[PrivateState]:
        for number in range(4):
            alive.append(number)
            yield state(random_tensor(8, 8, seed=number), f"user-{number}")

    leaked = raw(random_tensor(8, 8, seed=3))
    assert [hit.client_id for hit in find_private_in({"f": leaked}, states())] == ["user-3"]
    assert alive == [0, 1, 2, 3]


def test_like_numbers_of_others_are_not_taken_for_private_ones() -> None:
    # The same magnitudes everywhere, as in adapters that were trained alike.
    public = raw(random_tensor(200_000, seed=5)) + raw(random_tensor(50_000, seed=6), DTYPES[1])
    states = [state(random_tensor(64, 64, seed=n), f"user-{n}") for n in range(20, 40)]
    table = json.dumps(random_tensor(500, seed=7).tolist()).encode()
    assert find_private_in({"weights": public, "table.json": table}, states) == []
