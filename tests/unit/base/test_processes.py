"""Processes: misleading launches are refused, and work is shared and gathered in order."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pfm_llm.base import processes as processes_module
from pfm_llm.base.errors import LaunchError, StorageError
from pfm_llm.base.processes import (
    Processes,
    check_launch,
    log_to_trackers,
    start_processes,
    usable_cores,
)


class FakeAccelerator:
    """As many processes as it is told, and a memory of what was logged."""

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.process_index, self.num_processes = index, count
        self.is_main_process = index == 0
        self.device = torch.device("cpu")
        self.waited = 0
        self.logged: list[tuple[dict[str, Any], int]] = []

    def wait_for_everyone(self) -> None:
        self.waited += 1

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))


def _process(index: int = 0, count: int = 1) -> Processes:
    return Processes(FakeAccelerator(index, count), threads=1)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_process_where_several_were_asked_for_is_refused() -> None:
    """What `accelerate launch --cpu --num_processes 2` looks like from inside."""
    with pytest.raises(LaunchError, match=r"MASTER_ADDR .*only one was started.*--multi_gpu"):
        check_launch({"MASTER_ADDR": "127.0.0.1"})


def test_a_process_that_cannot_meet_the_others_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"WORLD_SIZE is 2 but MASTER_ADDR is not .*unset"):
        check_launch({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "environment", [{}, {"MASTER_ADDR": "x", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "1"}]
)
def test_other_launches_pass_the_first_check(environment: dict[str, str]) -> None:
    check_launch(environment)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_model_in_shards_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=rf"set to {name}, .*home folder.*--config_file without"):
        check_launch({f"ACCELERATE_USE_{name}": "true"})
    check_launch({f"ACCELERATE_USE_{name}": "false"})


def test_mixed_precision_is_said_once_to_be_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {}

    def accelerator(**settings: Any) -> FakeAccelerator:
        given.update(settings)
        return FakeAccelerator()

    monkeypatch.setattr(processes_module, "Accelerator", accelerator)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    processes_module._say_ignored.cache_clear()
    for _ in range(2):
        start_processes(threads=1)
    assert given["mixed_precision"] == "no"
    assert caplog.messages == [
        "accelerate's mixed_precision: fp16 is ignored; backbone.dtype of the config decides"
    ]


def test_what_accelerate_refuses_is_a_launch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ValueError("no such backend")

    monkeypatch.setattr(processes_module, "Accelerator", refuse)
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LaunchError, match=r"cannot start \(no such backend\); .*pfm train"):
        start_processes(threads=1)


def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """WORLD_SIZE says two, accelerate runs one: each would train everybody."""
    monkeypatch.setattr(processes_module, "Accelerator", lambda **_: FakeAccelerator())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(LaunchError, match=r"WORLD_SIZE is 2 but accelerate runs 1 .*torchrun"):
        start_processes(threads=1)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        start_processes(threads=1)


@pytest.mark.parametrize(
    ("threads", "local", "cores", "expected"),
    [(3, "1", 8, 3), (None, "1", 8, 8), (None, "2", 5, 2), (None, "4", 2, 1)],
)
def test_threads_are_as_told_or_a_share_of_the_cores(
    threads: int | None, local: str, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever OMP_NUM_THREADS the launcher exported."""
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(processes_module, "usable_cores", lambda: cores)
    monkeypatch.setattr(processes_module, "Accelerator", lambda **_: FakeAccelerator())
    started = start_processes(threads)
    assert started.threads == torch.get_num_threads() == expected


def test_the_main_process_holds_a_context_for_all(one_process: Processes) -> None:
    entered = []

    @contextlib.contextmanager
    def context(fails: bool) -> Iterator[str]:
        if fails:
            raise StorageError("no space")
        entered.append("in")
        yield "value"
        entered.append("out")

    with one_process.main_holds(context(False)) as value:
        assert (value, entered) == ("value", ["in"])
    assert entered == ["in", "out"]
    with pytest.raises(StorageError), one_process.main_holds(context(True)):
        pytest.fail("the context was not entered")


def test_a_single_process_starts_for_real(one_process: Processes) -> None:
    assert (one_process.index, one_process.count, one_process.is_main) == (0, 1, True)
    assert one_process.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one_process.wait()


def test_every_piece_of_work_is_shared_to_one_process() -> None:
    work = list("abcdefg")
    shares = [_process(index, 3).share(work) for index in range(3)]
    assert shares[1] == [(1, "b"), (4, "e")]
    assert sorted(piece for share in shares for piece in share) == list(enumerate(work))
    assert _process().share(work) == list(enumerate(work))
    assert _process(2, 3).share(["only"]) == []


def test_gathering_puts_pieces_in_the_order_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    work = list("abcdefg")
    everything = [piece for index in range(3) for piece in _process(index, 3).share(work)]
    monkeypatch.setattr(processes_module, "gather_object", lambda _: everything)
    assert _process(1, 3).gather(_process(1, 3).share(work)) == work
    assert _process().gather([(1, "b"), (0, "a")]) == ["a", "b"]
    assert _process().gather([]) == []


def test_gathering_never_compares_the_pieces() -> None:
    pieces = [object(), object()]
    assert _process().gather([(1, pieces[1]), (0, pieces[0])]) == pieces


def test_a_block_together_fails_on_all_when_it_fails_on_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure = StorageError("cannot write")
    monkeypatch.setattr(processes_module, "gather_object", lambda own: [*own, (0, failure)])
    other = _process(1, 2)
    with pytest.raises(StorageError, match="cannot write"), other.together():
        pass
    monkeypatch.setattr(processes_module, "gather_object", list)
    with other.together():
        pass
    with pytest.raises(LaunchError, match="own"), other.together():
        raise LaunchError("own")


def test_usable_cores_are_those_of_this_process() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0)) >= 1


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_trackers_receive_numbers_alone_those_of_mappings_by_dotted_names() -> None:
    accelerator = FakeAccelerator()
    validation = {"shared_only": {"ndcg@10": 0.25, "note": "x", "none": None}}
    log_to_trackers(
        Processes(accelerator, 1),  # type: ignore[arg-type]
        {"loss": 1.5, "round": 3, "validation": validation, "name": "x"},
        step=3,
    )
    figures = {"loss": 1.5, "round": 3, "validation.shared_only.ndcg_at_10": 0.25}
    assert accelerator.logged == [(figures, 3)]
