"""Cached trunk states: the same bits from disk or anew, private, bounded, and never half."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pfm_llm.base import files
from pfm_llm.client.trunk_cache import TrunkCache, trunk_states
from pfm_llm.text.encoding import Window
from tests.support.tiny_models import ARCHITECTURES, CLIENT_WINDOWS, make_backbone, random_window

WINDOWS = CLIENT_WINDOWS[1]
NUM_TOP = 2
PLENTY = 10**9


def _cache(
    root: Path,
    max_bytes: int = PLENTY,
    identity: str = "w/float32/2",
    dtype: torch.dtype = torch.float32,
    num_writers: int = 1,
) -> TrunkCache:
    trunk, _ = make_backbone("llama", dtype).split(NUM_TOP)
    return TrunkCache(trunk, root, identity, max_bytes, num_writers=num_writers)


def _entries(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def _equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_top_on_cached_states_equals_a_full_pass(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Windows of 6, 14 and 4 tokens, computed padded in one batch, against one at a time."""
    backbone = make_backbone(architecture, dtype)
    trunk, top = backbone.split(NUM_TOP)
    cache = TrunkCache(trunk, tmp_path, "x", PLENTY)
    cache.states(WINDOWS, "u")
    found = cache.states(WINDOWS, "u")
    assert (cache.hits, cache.misses) == (1, 1)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1  # bf16: 8 bits of values up to about 4
    for window, states in zip(WINDOWS, found, strict=True):
        assert states.dtype is dtype
        tokens = torch.from_numpy(window.tokens).long()[None]
        whole = backbone.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        composed = top(inputs_embeds=states[None], use_cache=False).last_hidden_state
        difference = (whole - composed).float().abs()
        assert float(difference.max()) <= tolerance
        assert float(difference.mean()) <= tolerance / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hit_a_recomputation_and_no_cache_give_the_same_bits(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    first = _cache(tmp_path / "a", dtype=dtype)
    miss, hit = first.states(WINDOWS, "u"), first.states(WINDOWS, "u")
    without = _cache(tmp_path / "b", max_bytes=0, dtype=dtype)
    again = [without.states(WINDOWS, "u") for _ in range(2)]
    other_process = _cache(tmp_path / "a", dtype=dtype)
    assert _equal(hit, miss)
    assert _equal(again[0], miss)
    assert _equal(again[1], miss)
    assert _equal(other_process.states(WINDOWS, "u"), miss)
    assert (first.hits, first.misses) == (1, 1)
    assert (without.hits, without.misses) == (0, 2)
    assert (other_process.hits, other_process.misses) == (1, 0)
    assert _entries(tmp_path / "b") == []


def test_no_windows_no_states_no_file(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    assert cache.states([], "u") == []
    assert (cache.hits, cache.misses) == (0, 0)
    assert _entries(tmp_path) == []


def test_the_budget_bounds_what_is_on_disk(tmp_path: Path) -> None:
    """24 tokens of 32 float32 take 3,072 bytes and a header: two fit into 7,000, three do not."""
    cache = _cache(tmp_path, max_bytes=7000)
    for client in ("a", "b", "c", "c"):
        cache.states(WINDOWS, client)
    assert [path.parts[-3] for path in _entries(tmp_path)] == ["a", "b"]
    assert (cache.hits, cache.misses) == (0, 4)
    later = _cache(tmp_path, max_bytes=7000)  # counts what earlier runs left
    later.states(WINDOWS, "d")
    assert later.states(WINDOWS, "a")
    assert (later.hits, later.misses) == (1, 1)
    assert sum(path.stat().st_size for path in _entries(tmp_path)) <= 7000


def test_processes_share_the_budget(tmp_path: Path) -> None:
    """Half of 7,000 is one entry each."""
    caches = [_cache(tmp_path, max_bytes=7000, num_writers=2) for _ in range(2)]
    for number in range(3):
        for index, cache in enumerate(caches):
            cache.states(WINDOWS, f"u{number}-{index}")
    assert 1 <= len(_entries(tmp_path)) <= 2
    assert sum(path.stat().st_size for path in _entries(tmp_path)) <= 7000


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_value(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))


def _other_content(path: Path) -> None:
    files.write_tensors(path, {"states": torch.zeros(24, 32)})


def _fewer_rows(path: Path) -> None:
    files.write_tensors(path, {"states": torch.zeros(3, 32)})


def _no_states(path: Path) -> None:
    files.write_tensors(path, {"other": torch.zeros(24, 32)})


@pytest.mark.parametrize(
    "damage",
    [
        _cut_in_half,
        _flip_a_value,
        _other_content,
        _fewer_rows,
        _no_states,
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_damaged_file_is_said_and_computed_again(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = _cache(tmp_path, max_bytes=4000)
    expected = cache.states(WINDOWS, "u")
    (path,) = _entries(tmp_path)
    whole = path.read_bytes()
    damage(path)
    assert _equal(cache.states(WINDOWS, "u"), expected)
    assert "computing it again" in caplog.text
    assert path.name in caplog.text
    assert path.read_bytes() == whole  # there was room for it once more
    assert cache.misses == 2
    assert _equal(cache.states(WINDOWS, "u"), expected)
    assert cache.hits == 1


def test_files_are_the_clients_and_private(tmp_path: Path) -> None:
    root = tmp_path / "run.private" / "clients"
    cache = _cache(root)
    cache.states(WINDOWS, "user-1")
    (path,) = _entries(tmp_path)
    assert path.relative_to(root).parts[:2] == ("user-1", "trunk")
    for folder in (root, root / "user-1", root / "user-1" / "trunk"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_backbone_or_number_of_layers_is_another_entry(tmp_path: Path) -> None:
    for identity in ("w/float32/2", "other/float32/2", "w/bfloat16/2", "w/float32/3"):
        cache = _cache(tmp_path, identity=identity)
        cache.states(WINDOWS, "u")
        assert (cache.hits, cache.misses) == (0, 1), identity
    assert len(_entries(tmp_path)) == 4


def test_other_tokens_or_other_windows_are_another_entry(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    for windows in (WINDOWS, WINDOWS[:2], WINDOWS[::-1], [random_window([2, 2], 99)]):
        cache.states(windows, "u")
    assert (cache.hits, cache.misses) == (0, 4)
    cache.states(WINDOWS, "other client")
    assert cache.misses == 5  # never shared between clients


def test_a_window_shortened_on_the_left_is_its_own_entry(tmp_path: Path) -> None:
    """Its states are not a slice of the longer one's, which have attended to what was cut."""
    long = random_window([3, 3, 3], 1, header=0)
    tokens = np.ascontiguousarray(long.tokens[3:])
    cut = Window(tokens, long.item_ends[1:] - 3, long.history, start=1, first_target=1)
    cache = _cache(tmp_path)
    (whole,), (shortened,) = cache.states([long], "u"), cache.states([cut], "u")
    assert (cache.hits, cache.misses) == (0, 2)
    assert float((whole[3:] - shortened).abs().max()) > 0.01


def test_a_full_disk_costs_time_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = _cache(tmp_path)
    expected = _cache(tmp_path / "other").states(WINDOWS, "u")
    monkeypatch.setattr(os, "fsync", full)
    assert _equal(cache.states(WINDOWS, "u"), expected)
    assert "going on without it" in caplog.text
    assert [p for p in (tmp_path / "u").rglob("*") if p.is_file()] == []
    monkeypatch.undo()
    assert _equal(cache.states(WINDOWS, "u"), expected)
    assert cache.misses == 2  # it does not try again


@pytest.mark.parametrize(("batch_tokens", "sizes"), [(1, [14, 6, 4]), (30, [28, 4]), (99, [42])])
def test_the_tokens_of_a_batch_are_bounded(
    batch_tokens: int, sizes: list[int], tmp_path: Path
) -> None:
    """Windows of 6, 14 and 4 tokens, padded to the longest of their batch, longest first."""
    trunk, _ = make_backbone().split(NUM_TOP)
    seen: list[int] = []
    trunk.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    states = trunk_states(trunk, WINDOWS, batch_tokens)
    assert seen == sizes
    together = _cache(tmp_path, max_bytes=0).states(WINDOWS, "u")
    for own, expected in zip(states, together, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def _files_below_a_file(root: Path) -> Path:
    (root / "file").touch()
    return root / "file" / "clients"


def _folders_that_are_files(root: Path) -> Path:
    (root / "u").touch()
    return root


@pytest.mark.parametrize("blocked", [_files_below_a_file, _folders_that_are_files])
def test_a_folder_that_cannot_be_written_costs_time_and_not_the_run(
    blocked: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = _cache(blocked(tmp_path))
    expected = trunk_states(make_backbone("llama", torch.float32).split(NUM_TOP)[0], WINDOWS)
    for _ in range(3):
        assert _equal(cache.states(WINDOWS, "u"), expected)
    assert caplog.text.count("going on without it") == 1


def test_a_folder_in_place_of_an_entry_costs_time_and_not_the_run(tmp_path: Path) -> None:
    expected = _cache(tmp_path).states(WINDOWS, "u")
    (entry,) = _entries(tmp_path)
    entry.unlink()
    entry.mkdir()
    assert _equal(_cache(tmp_path).states(WINDOWS, "u"), expected)


def test_only_damage_deletes_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _cache(tmp_path).states(WINDOWS, "u")
    (entry,) = _entries(tmp_path)

    def failing(error: BaseException) -> Callable[..., None]:
        def read(*_: object) -> None:
            raise error

        return read

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", failing(AssertionError("written")))
        patch.setattr(files, "read_tensors", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            _cache(tmp_path).states(WINDOWS, "u")
    with monkeypatch.context() as patch:
        patch.setattr(files, "read_tensors", failing(OSError(errno.EMFILE, "too many open files")))
        assert _equal(_cache(tmp_path, max_bytes=0).states(WINDOWS, "u"), expected)
    assert _entries(tmp_path) == [entry]
