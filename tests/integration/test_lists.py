"""Three lists side by side: by the shared part alone, with the own private part, with another's."""

import dataclasses
import json
from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.model.private import taste
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import open_run, run_experiment
from pfm_llm.runs.lists import LISTS_FILE, UserLists, compare_lists, example_users, read_lists
from pfm_llm.runs.run import Run, Trained
from tests.support.tiny import Tiny


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # Large rates, so that private parts matter after four rounds.
        patch.setattr(taste, "_RATE", 0.5)
        patch.setattr(taste, "_RATE_ITEMS", 0.5)
        folder = tmp_path_factory.mktemp("lists")
        return run_experiment(tiny.config(folder, method="pfm", evaluation__baselines=[]))


@pytest.fixture(scope="module")
def opened(finished: Path) -> tuple[Run, Trained]:
    return open_run(finished)


def kept(finished: Path) -> list[UserLists]:
    private = finished.with_name(f"{finished.name}.private")
    return read_lists(json.loads((private / LISTS_FILE).read_text()))


def test_a_run_keeps_the_lists_of_three_users_in_its_private_folder(
    finished: Path, opened: tuple[Run, Trained]
) -> None:
    run, trained = opened
    lists = kept(finished)
    assert [one.user for one in lists] == example_users(run)
    lengths = [one.history_length for one in lists]
    assert len(lists) == 3
    assert lengths == sorted(lengths)
    assert lists == [compare_lists(run, trained, one.user) for one in lists]
    assert not list(finished.rglob(LISTS_FILE))


def test_the_lists_are_what_serving_would_show(finished: Path, opened: tuple[Run, Trained]) -> None:
    run, trained = opened
    [user, *_] = example_users(run)
    lists = compare_lists(run, trained, user)
    query = run.data.interactions.user_ids.index(user)
    place = run.data.split.test.users.tolist().index(query)
    history = [
        run.data.interactions.catalogue.item_ids[i]
        for i in run.data.split.test.histories[place].tolist()
    ]
    films, private = Recommender.of_run(run, trained), finished.with_name("tiny.private")

    def served(owner: str | None) -> tuple[str, ...]:
        part = None if owner is None else films.load_private(private, f"user-{owner}")
        return tuple(item.title for item in films.recommend(history, 5, private=part))

    assert lists.shared == served(None)
    assert lists.own == served(user)
    assert lists.other_own == served(lists.other)
    assert lists.other != user


def test_a_private_weight_of_nothing_leaves_the_shared_list(opened: tuple[Run, Trained]) -> None:
    run, trained = opened
    off = dataclasses.replace(trained, private_weight=0.0)
    for user in example_users(run):
        lists = compare_lists(run, off, user)
        assert lists.shared == lists.own == lists.other_own
    assert any(
        len({one.shared, one.own, one.other_own}) > 1
        for one in (compare_lists(run, trained, user) for user in example_users(run))
    )


def test_new_titles_are_marked(finished: Path) -> None:
    lists = dataclasses.replace(
        kept(finished)[0], shared=("A", "B"), own=("B", "C"), other_own=("A", "B")
    )
    assert "| A | B | A |\n| B | + C | B |" in lists.markdown()
    assert "+ C" in lists.text()


def test_who_cannot_be_compared_is_said(opened: tuple[Run, Trained]) -> None:
    run, trained = opened
    with pytest.raises(DataError, match="no user 'nobody'"):
        compare_lists(run, trained, "nobody")
    adapters = run.config.adapters
    off = adapters.private.model_copy(update={"enabled": False})
    config = run.config.model_copy(
        update={"adapters": adapters.model_copy(update={"private": off})}
    )
    with pytest.raises(DataError, match="no private parts"):
        compare_lists(dataclasses.replace(run, config=config), trained, "u0")
