"""What a node notes of its clients is on its disk, or is tried again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import NodeRefused, StorageError
from pfm_llm.node import slots
from pfm_llm.node.slots import AskedRounds, Left, Slots

Fail = Callable[[Callable[[], None]], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Acts once while the disk is full."""

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    def act(call: Callable[[], None]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(slots, "write_json", full)
            with pytest.raises(StorageError):
                call()

    return act


def test_who_leaves_while_the_disk_is_full_has_left_after_a_second_call(
    tmp_path: Path, fail: Fail
) -> None:
    left = Left(tmp_path)
    for act in (fail, lambda call: call()):
        act(lambda: left.add("user-7"))
    assert "user-7" in left
    assert "user-7" in Left(tmp_path)


def test_an_id_that_could_not_be_deleted_is_by_a_second_call(tmp_path: Path, fail: Fail) -> None:
    ids = ["user-7", "user-8"]
    found = Slots(tmp_path, ids)
    for act in (fail, lambda call: call()):
        act(lambda: found.forget("user-7"))
        assert list(found.clients((0, 1))) == ["user-8"]
    assert "user-7" not in (tmp_path / "slots.json").read_text()
    assert len(Slots(tmp_path, ids[1:])) == 2


def test_a_round_that_could_not_be_noted_is_noted_when_it_is_asked_again(
    tmp_path: Path, fail: Fail
) -> None:
    asked = AskedRounds(tmp_path)
    for act in (fail, lambda call: call()):
        act(lambda: asked.ask(1, (0, 1)))
    with pytest.raises(NodeRefused, match="round 1 was asked for other slots"):
        AskedRounds(tmp_path).ask(1, (0,))
