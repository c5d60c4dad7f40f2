"""A personal agent on a tiny random model: what the user says is done, and taken back exactly."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pfm_llm.agent.actions import NOT_NOW_SECONDS, Kind
from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.ranking import log_shares
from pfm_llm.base.errors import ConfigError, CorruptFileError, DataError
from pfm_llm.recommender import Recommender
from tests.conftest import TinyRun
from tests.support.agents import HISTORY, Clock


def _list(agent: PersonalAgent, k: int = 10) -> list[str]:
    return [one.item_id for one in agent.recommend(k)]


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def test_the_list_is_that_of_the_recommender_with_the_private_part(
    agent: PersonalAgent, model: Recommender, tmp_path: Path
) -> None:
    history = [event.item_id for event in agent.history()]
    private = model.personalise(history, tmp_path / "private")
    assert _same(dict(private.tensors), agent.private_part())
    expected = model.recommend(history, 8, private=private)
    assert _list(agent, 8) == [one.item_id for one in expected]
    assert agent.recommend(8)[0].fields.keys() == model.catalogue.fields.keys() - {"title"}


def test_a_suggestion_says_what_is_ones_own(agent: PersonalAgent, model: Recommender) -> None:
    history = [event.item_id for event in agent.history()]
    unmet = np.array([item not in history for item in model.catalogue.item_ids])
    shared = log_shares(model.score(history), unmet)
    places = np.argsort(-shared, kind="stable").tolist()
    for one in agent.recommend(5):
        item = model.items([one.item_id])[0]
        assert one.place_shared == places.index(item) + 1
    alone = agent.recommend(5, weight=0)
    assert [one.place_shared for one in alone] == [1, 2, 3, 4, 5]
    assert all(one.own == pytest.approx(0, abs=1e-6) for one in alone)
    assert any(abs(one.own) > 1e-3 for one in agent.recommend(5))


@pytest.mark.parametrize("kind", [Kind.LIKE, Kind.SEEN])
def test_an_item_that_the_user_knows_joins_the_history(agent: PersonalAgent, kind: Kind) -> None:
    first, before = _list(agent)[0], agent.private_part()
    assert agent.feedback(first, kind)
    assert agent.history()[-1].item_id == first
    assert first not in _list(agent)
    assert not _same(agent.private_part(), before)


@pytest.mark.parametrize("kind", [Kind.DISLIKE, Kind.LESS_LIKE_THIS, Kind.NOT_NOW])
def test_an_item_that_is_turned_down_goes_and_teaches_nothing(
    agent: PersonalAgent, kind: Kind
) -> None:
    first, before = _list(agent)[0], agent.private_part()
    agent.feedback(first, kind)
    assert first not in _list(agent, 30)
    assert _same(agent.private_part(), before)


def test_not_now_comes_back(agent: PersonalAgent, clock: Clock) -> None:
    before = _list(agent)
    agent.feedback(before[0], "not_now")
    clock.now += NOT_NOW_SECONDS
    assert _list(agent) == before


def test_less_like_this_moves_similar_items_alone(
    agent: PersonalAgent, ids: tuple[str, ...]
) -> None:
    before = _list(agent, 30)
    agent.feedback(before[0], "less_like_this")
    near = {ids[item] for item in agent._similarity.neighbours(ids.index(before[0]))}
    after = _list(agent, 30)
    others = [item for item in before[1:] if item not in near]
    assert [item for item in after if item not in near] == others
    assert after != before[1:]
    agent.set_strength(0)
    assert _list(agent, 30) == before[1:]


@pytest.mark.parametrize("kind", [*Kind])
def test_undo_leaves_what_would_be_without_the_action(
    agent: PersonalAgent, kind: Kind, ids: tuple[str, ...]
) -> None:
    files = {path.name: path.read_bytes() for path in agent.folder.iterdir() if path.is_file()}
    private, shown = agent.private_part(), agent.recommend(30)
    if kind is Kind.EXCLUDE:
        agent.exclude(ids[HISTORY[2]])
    elif kind is Kind.MET:
        agent.add_history([ids[0]])
    else:
        agent.feedback(shown[0].item_id, kind)
    undone = agent.undo()
    assert undone is not None
    assert undone.kind is kind
    assert _same(agent.private_part(), private)
    assert agent.recommend(30) == shown
    assert all((agent.folder / name).read_bytes() == content for name, content in files.items())


def test_undo_of_nothing_is_nothing(model: Recommender, tmp_path: Path) -> None:
    assert PersonalAgent(model, tmp_path / "new").undo() is None


@pytest.mark.parametrize("how", ["exclude", "forget", "exclude period", "forget period"])
def test_without_an_event_the_private_part_is_as_if_it_had_never_been(
    agent: PersonalAgent, model: Recommender, tmp_path: Path, ids: tuple[str, ...], how: str
) -> None:
    gone = ids[HISTORY[3]]
    at = next(event.at for event in agent.history() if event.item_id == gone)
    period = {"since": at, "until": at + 1e-7} if "period" in how else {"item_id": gone}
    if "exclude" in how:
        agent.exclude(**period)
    else:
        assert agent.forget(**period) == 1
    never = PersonalAgent(model, tmp_path / "never")
    never.add_history([ids[item] for item in HISTORY if ids[item] != gone])
    assert _same(agent.private_part(), never.private_part())
    shown = _list(agent, 30)
    if "exclude" in how:  # it has been met, and is not shown again
        assert shown == [item for item in _list(never, 30) if item != gone]
    else:
        assert shown == _list(never, 30)
        assert gone not in _content(agent.folder)


def _content(folder: Path) -> str:
    actions = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    return " ".join(json.dumps(json.loads(text)) for text in actions if text)


def test_forgetting_everything_leaves_an_empty_folder(agent: PersonalAgent) -> None:
    agent.mix(0.5)
    assert agent.forget() == len(HISTORY)
    assert list(agent.folder.iterdir()) == []
    assert agent.history() == ()
    assert agent.settings.weight is None


def test_events_that_were_left_out_can_count_again(
    agent: PersonalAgent, ids: tuple[str, ...]
) -> None:
    before = agent.known
    agent.exclude(ids[HISTORY[2]])
    agent.exclude(ids[HISTORY[3]])
    agent.include(ids[HISTORY[2]])
    assert [event.item_id for event in agent.history() if not event.counts] == [ids[HISTORY[3]]]
    agent.include(ids[HISTORY[3]])
    assert agent.known == before


def test_what_is_kept_in_memory_is_that_of_the_last_events(
    agent: PersonalAgent, model: Recommender, tmp_path: Path, ids: tuple[str, ...]
) -> None:
    """Other events between two equal questions change neither list nor reasons."""
    shown, reasons = agent.recommend(30), agent.explain(_list(agent)[0])
    agent.feedback(_list(agent)[1], "like")
    assert agent.recommend(30) != shown
    assert agent.explain(shown[0].item_id) != reasons
    agent.undo()
    assert agent.recommend(30) == shown
    assert agent.explain(shown[0].item_id) == reasons
    assert agent.recommend(30, weight=0.3) != shown


def test_the_mix_re_ranks_without_learning(agent: PersonalAgent) -> None:
    private, default = agent.private_part(), _list(agent)
    assert agent.weight == agent.model.serving.weight
    agent.mix(0.0)
    assert agent.weight == 0
    shared = _list(agent)
    assert shared != default
    assert _same(agent.private_part(), private)
    agent.mix(None)
    assert _list(agent) == default
    with pytest.raises(DataError, match="weight"):
        agent.mix(2.0)
    assert _list(agent) == default


def test_a_paused_agent_keeps_nothing(agent: PersonalAgent) -> None:
    agent.pause()
    before = _list(agent)
    assert not agent.feedback(before[0], "like")
    assert _list(agent) == before
    agent.pause(False)
    assert agent.feedback(before[0], "like")


def test_only_matching_items_are_shown(agent: PersonalAgent, model: Recommender) -> None:
    field, texts = next((n, t) for n, t in model.catalogue.fields.items())
    sought = texts[0][:3].upper()
    found = agent.recommend(30, where={field: sought})
    titles = [one.title if field == "title" else one.fields[field] for one in found]
    assert titles
    assert all(sought.lower() in title.lower() for title in titles)
    with pytest.raises(DataError, match="no field 'mood'"):
        agent.recommend(where={"mood": "good"})


def test_an_export_is_read_back_elsewhere(
    agent: PersonalAgent, model: Recommender, tmp_path: Path, clock: Clock
) -> None:
    agent.feedback(_list(agent)[0], "less_like_this")
    agent.mix(0.25)
    agent.export(tmp_path / "mine.json")
    other = PersonalAgent(model, tmp_path / "other", clock)
    other.import_(tmp_path / "mine.json")
    assert other.recommend(20) == agent.recommend(20)
    assert other.settings == agent.settings
    assert stat.S_IMODE((tmp_path / "mine.json").stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "pfm-agent/1", "settings": {}, "actions": [{"kind": "met"}]}',
        '{"format": "pfm-agent/1", "settings": {"weight": 9}, "actions": []}',
        '{"format": "pfm-agent/1", "settings": {}, "actions": 3}',
    ],
)
def test_a_file_that_is_no_export_changes_nothing(
    agent: PersonalAgent, tmp_path: Path, content: str
) -> None:
    (tmp_path / "bad.json").write_text(content)
    before = agent.recommend(5)
    with pytest.raises(CorruptFileError):
        agent.import_(tmp_path / "bad.json")
    assert agent.recommend(5) == before


def test_only_the_owner_can_read_the_folder(agent: PersonalAgent) -> None:
    agent.mix(0.5)
    assert stat.S_IMODE(agent.folder.stat().st_mode) == 0o700
    assert {path.name for path in agent.folder.iterdir()} <= {
        "actions.json", "settings.json", ".lock"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.feedback("nowhere", "like"), "no item 'nowhere'"),
        (lambda a: a.feedback("3", "adore"), "no feedback 'adore'"),
        (lambda a: a.feedback("3", "exclude"), "no feedback 'exclude'"),
        (lambda a: a.exclude("nowhere"), "not in the history"),
        (lambda a: a.exclude(), "an item, or a period"),
        (lambda a: a.exclude(since=1), "an item, or a period"),
        (lambda a: a.forget(since=1), "a period with since and until"),
        (lambda a: a.add_history(["nowhere"]), "no item 'nowhere'"),
        (lambda a: a.add_history([a.history()[0].item_id], times=[1, 2]), "as many times"),
        (lambda a: a.explain(a.history()[0].item_id), "is in the history"),
    ],
)
def test_a_wrong_call_is_refused_and_changes_nothing(
    agent: PersonalAgent, call: Callable[[PersonalAgent], object], message: str
) -> None:
    before = agent.known
    with pytest.raises(DataError, match=message):
        call(agent)
    assert agent.known == before


def test_an_agent_without_a_history_recommends_what_most_people_like(
    model: Recommender, tmp_path: Path
) -> None:
    agent = PersonalAgent(model, tmp_path / "new")
    assert _list(agent, 5) == [one.item_id for one in model.recommend([], 5)]
    assert "Nothing is known" in agent.explain(_list(agent)[0]).warning


def test_reasons_are_what_the_list_is_without_the_event(
    agent: PersonalAgent, model: Recommender, tmp_path: Path, ids: tuple[str, ...]
) -> None:
    """The reference serves somebody who has never met the item."""
    shown = agent.recommend(6)[4]
    found = agent.explain(shown.item_id)
    item = ids.index(shown.item_id)
    met = [ids[number] for number in HISTORY]
    unmet = np.array([item_id not in met for item_id in ids])
    assert {reason.item_id for reason in found.reasons} == set(met)
    assert [r.effect for r in found.reasons] == sorted(r.effect for r in found.reasons)[::-1]
    for reason in found.reasons:
        never = PersonalAgent(model, tmp_path / f"without-{reason.item_id}")
        never.add_history([item_id for item_id in met if item_id != reason.item_id])
        scores = never._ranking.both(never.known.counted, None).both
        with_all = agent._ranking.both(agent.known.counted, None).both
        effect = log_shares(with_all, unmet)[item] - log_shares(scores, unmet)[item]
        assert reason.effect == pytest.approx(effect, abs=1e-5)
        better = (scores >= scores[item]) & unmet & (np.arange(len(ids)) != item)
        assert reason.place_without == 1 + better.sum()
    assert found.place == 5
    assert found.place_shared == shown.place_shared
    assert found.own == pytest.approx(shown.own)


def test_a_private_part_that_takes_steps_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tiny_run(method="fedrep")
    with pytest.raises(ConfigError, match="trained by steps"):
        PersonalAgent(Recommender.of_run(run, run.as_set(run.model.shared)), tmp_path)
