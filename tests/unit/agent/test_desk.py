"""What a page may do with an agent, and who may use it; without the web."""

import json
import math
import stat
from pathlib import Path

import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.access import TOKEN, is_same, own_token
from pfm_llm.agent.web.desk import Desk, ItemIndex, lean
from pfm_llm.base.errors import DataError
from pfm_llm.recommender import Recommender
from tests.support.agents import HISTORY


@pytest.fixture
def desk(agent: PersonalAgent, model: Recommender) -> Desk:
    return Desk(agent, ItemIndex(model.catalogue))


def test_the_token_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    token = own_token(tmp_path)
    assert len(token) == 43
    assert stat.S_IMODE((tmp_path / TOKEN).stat().st_mode) == 0o600
    assert own_token(tmp_path) == token
    assert is_same(token, token)
    assert not is_same(token[:-1], token)
    assert not is_same("é" + token, token)


@pytest.mark.parametrize("content", ["", "short", "x" * 42 + "!", "x" * 44, "é" * 43])
def test_a_damaged_token_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / TOKEN).write_text(content)
    (tmp_path / TOKEN).chmod(0o600)
    assert own_token(tmp_path) != content
    assert own_token(tmp_path) == (tmp_path / TOKEN).read_text()


def test_a_token_that_others_could_read_is_replaced(tmp_path: Path) -> None:
    seen = own_token(tmp_path)
    (tmp_path / TOKEN).chmod(0o644)
    assert own_token(tmp_path) != seen
    assert stat.S_IMODE((tmp_path / TOKEN).stat().st_mode) == 0o600


def test_items_are_found_by_title(desk: Desk, model: Recommender) -> None:
    titles = model.catalogue.fields["title"]
    found = desk.items.search("blue fsh")
    assert found[0].title == "blue fish"
    assert found[0].item_id == model.catalogue.item_ids[titles.index("blue fish")]
    assert desk.items.search("blue", 3)[2].title.startswith("blue")
    assert len(desk.items.search("blue", 3)) == 3


def test_the_history_is_newest_first(desk: Desk, ids: tuple[str, ...]) -> None:
    assert [item.item_id for _, item in desk.history()] == [ids[one] for one in HISTORY[::-1]]


def test_what_was_turned_down_is_listed_once_and_what_was_met_is_not(
    model: Recommender, tmp_path: Path
) -> None:
    agent = PersonalAgent(model, tmp_path / "now")  # the desk reads the clock of the machine
    desk = Desk(agent, ItemIndex(model.catalogue))
    one, two, three, four = model.catalogue.item_ids[:4]
    for item, kind in (
        (one, "dislike"),
        (two, "less_like_this"),
        (two, "not_now"),
        (three, "not_now"),
        (four, "dislike"),
        (four, "like"),
    ):
        agent.feedback(item, kind)
    found = {down.item.item_id: (down.less, down.until is None) for down in desk.turned_down()}
    assert found == {two: (True, True), one: (False, True), three: (False, False)}
    assert len(desk.turned_down()) == 3


def test_an_export_is_imported_and_nothing_else_stays_in_the_folder(desk: Desk) -> None:
    before, files = desk.agent.known, desk.files()
    content = desk.export()
    assert len(json.loads(content)["actions"]) == len(HISTORY)
    desk.agent.forget()
    assert desk.files() == {}
    desk.import_(content)
    assert desk.agent.known == before
    with pytest.raises(DataError):
        desk.import_(b"{}")
    assert desk.agent.known == before
    assert desk.files() == files | {"settings.json": desk.files()["settings.json"]}
    assert [path.name for path in desk.agent.folder.iterdir() if path.is_dir()] == []


def test_the_lean_is_that_of_two_probabilities() -> None:
    assert lean(0) == 0.5
    assert lean(math.log(0.3) - math.log(0.1)) == pytest.approx(0.3 / (0.3 + 0.1))
    assert lean(-2) == pytest.approx(1 - lean(2))
