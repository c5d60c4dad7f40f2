"""Lists side by side: shared part, the user's private part, another user's."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.terminal import columns
from pfm_llm.evaluation import scoring
from pfm_llm.protocol.types import Mode
from pfm_llm.publish.alignment import Alignment
from pfm_llm.recommender import Recommender
from pfm_llm.runs import lists
from pfm_llm.runs.lists import Listed, UserLists, compare_lists, example_users
from pfm_llm.runs.measuring import evaluation_task, measure
from pfm_llm.runs.run import Run, Trained
from tests.conftest import TinyRun
from tests.support.tiny import write_interactions


def evaluated(run: Run, weight: float = 1.0) -> Trained:
    """A shared state drawn at random, once each client keeps a private part that counts a lot."""
    draw, fresh = torch.Generator().manual_seed(0), run.model.shared
    drawn = {
        name: value + 0.3 * torch.randn(value.shape, generator=draw)
        for name, value in fresh.tensors.items()
    }
    trained = Trained(dataclasses.replace(fresh, tensors=drawn), weight)
    fitted = Trained(trained.shared, 1.0)
    measure(run, evaluation_task(run, fitted, run.data.split.test, keep=True))
    store = run.clients.store
    for client_id in store.client_ids():
        kept = store.load_personalised(client_id)
        assert kept is not None
        larger = {name: 10 * value for name, value in kept.tensors.items()}
        store.save_personalised(dataclasses.replace(kept, tensors=larger))
    return trained


def titles(found: UserLists, name: str) -> list[str]:
    return [item.title for item in found.lists[name]]


def lengths(run: Run, users: list[str]) -> list[int]:
    interactions = run.data.interactions
    return [len(interactions.history(interactions.user(user))) for user in users]


# --- the users --------------------------------------------------------------------------------


def test_examples_are_at_the_percentiles_of_the_length_of_a_history(tiny_run: TinyRun) -> None:
    run = tiny_run()
    everybody = sorted(lengths(run, list(run.data.interactions.user_ids)))
    assert lengths(run, example_users(run)) == [everybody[2], everybody[12], everybody[21]]


def test_equal_lengths_are_in_order_of_the_id(tiny_run: TinyRun, tmp_path: Path) -> None:
    source = write_interactions(
        tmp_path / "i.csv", {f"u{number}": [0, 1, 2, 3, 4] for number in range(11)}
    )
    run = tiny_run(data__source=str(source))
    ids = run.data.interactions.user_ids
    assert example_users(run) == [ids[1], ids[5], ids[9]]


@pytest.mark.parametrize("num_users", [1, 2, 3])
def test_few_users_are_shown_once(num_users: int, tiny_run: TinyRun, tmp_path: Path) -> None:
    histories = {f"u{number}": list(range(5 + number)) for number in range(num_users)}
    source = write_interactions(tmp_path / "i.csv", histories)
    found = example_users(tiny_run(data__source=str(source), federation__cohort_size=1))
    assert found == list(histories)


# --- the lists --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pfm", "custom"])
def test_each_list_is_of_its_own_part_after_the_whole_history(
    method: str, tiny_run: TinyRun
) -> None:
    """``custom`` has a private LoRA, which acts on the states and not on the scores alone."""
    run = tiny_run(method=method, head__item_met=False)
    trained = evaluated(run)
    user = example_users(run)[1]
    found = compare_lists(run, trained, user, k=4)
    assert list(found.lists) == ["shared", "own", "other"]
    assert found.user == user
    history = run.data.interactions.history(run.data.interactions.user(user)).tolist()
    texts = run.data.interactions.catalogue.fields["title"]
    seen = {texts[item] for item in history}
    assert found.history_length == len(history)
    assert found.newest == tuple(texts[item] for item in history[-3:])
    shared = set(titles(found, "shared"))
    for name, items in found.lists.items():
        assert len({item.title for item in items}) == 4
        assert not seen & {item.title for item in items}
        assert [item.is_new for item in items] == [item.title not in shared for item in items], name
    assert len({tuple(titles(found, name)) for name in found.lists}) == 3
    assert any(item.is_new for item in found.lists["own"])


def test_another_users_list_is_what_that_users_part_gives(tiny_run: TinyRun) -> None:
    """The other one stands half the order of 24 users away."""
    run = tiny_run(method="pfm")
    trained = evaluated(run)
    ids, client_of = run.data.interactions.user_ids, run.clients.histories.client_of
    order = sorted(range(24), key=lambda user: (*lengths(run, [ids[user]]), user))
    user, other = order[3], order[15]
    theirs = run.clients.store.load_personalised(client_of(other))
    before = compare_lists(run, trained, ids[user], k=10)
    assert theirs is not None
    run.clients.store.save_personalised(dataclasses.replace(theirs, client_id=client_of(user)))
    after = compare_lists(run, trained, ids[user], k=10)
    assert titles(after, "own") == titles(after, "other") == titles(before, "other")
    assert titles(after, "own") != titles(before, "own")
    assert titles(after, "shared") == titles(before, "shared")


def test_items_that_came_since_the_training_are_new_where_met_ones_are_not_learned(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(method="pfm", head__item_met=False)
    trained = evaluated(run)
    user, count = run.data.interactions.user_ids[4], len(run.data.interactions.catalogue)
    plain = titles(compare_lists(run, trained, user, k=6, new_share=0.5), "own")
    # Of the items that rank last, six came since.
    ranked = titles(compare_lists(run, trained, user, k=count), "own")
    late = ranked[-6:]
    names = run.data.interactions.catalogue.fields["title"]
    rows = tuple(None if name in late else row for row, name in enumerate(names))
    alignment = Alignment(rows, count)
    found = compare_lists(run, trained, user, k=6, new_share=0.5, alignment=alignment)
    served = Recommender.of_run(run, trained, user, alignment).recommend(k=6, new_share=0.5)
    assert titles(found, "own") == [item.title for item in served]
    assert len(set(titles(found, "own")) & set(late)) == 3
    assert plain == ranked[:6]


def test_the_lists_are_those_of_serving(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm")
    trained = evaluated(run)
    user = run.data.interactions.user_ids[4]
    found = compare_lists(run, trained, user, k=6)
    served = Recommender.of_run(run, trained, user).recommend(k=6)
    assert titles(found, "own") == [item.title for item in served]
    unserved = Recommender.of_run(run, trained, user).recommend(k=6, private_weight=0.0)
    assert titles(found, "shared") == [item.title for item in unserved]


def test_the_shared_list_is_that_of_the_evaluator(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm")
    trained = evaluated(run)
    query = run.data.interactions.history_of(4)
    held_out = run.data.split.test
    index = held_out.users.tolist().index(4)
    whole = dataclasses.replace(
        held_out.take([index]),
        histories=(query.items,),
        targets=(np.empty(0, np.int32),),
    )
    task = evaluation_task(run, trained, whole, (Mode.SHARED_ONLY,))
    scored = run.evaluator.score_chunk([run.clients.histories.client_of(4)], task)
    best, _ = scoring.top_items(scored.scores[Mode.SHARED_ONLY][0], query.items, 5)
    texts = run.data.interactions.catalogue.fields["title"]
    found = compare_lists(run, trained, run.data.interactions.user_ids[4], new_share=0.0)
    assert titles(found, "shared") == [texts[item] for item in best]


@pytest.mark.parametrize("settings", [{"adapters__private__enabled": False}, {}])
def test_without_a_kept_private_part_there_is_one_list(
    settings: dict[str, object], tiny_run: TinyRun
) -> None:
    run = tiny_run(**settings)
    user = run.data.interactions.user_ids[0]
    found = compare_lists(run, run.as_set(run.model.shared), user)
    assert list(found.lists) == ["shared"]
    assert not any(item.is_new for item in found.lists["shared"])
    assert "There is one list" in found.text()


def test_a_private_part_without_weight_has_no_list(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm")
    trained = evaluated(run, weight=0.0)
    assert list(compare_lists(run, trained, example_users(run)[0]).lists) == ["shared"]


def test_a_single_user_has_nobody_to_be_compared_with(tiny_run: TinyRun, tmp_path: Path) -> None:
    source = write_interactions(tmp_path / "i.csv", {"u0": list(range(27))})
    run = tiny_run(method="pfm", data__source=str(source), federation__cohort_size=1)
    found = compare_lists(run, evaluated(run), "u0")
    assert list(found.lists) == ["shared", "own"]
    assert len(found.lists["own"]) == 3  # all that is left of 30 items


def test_the_other_user_is_of_another_client(tiny_run: TinyRun) -> None:
    run = tiny_run(method="custom", data__users_per_client=12, federation__cohort_size=1)
    trained = evaluated(run)
    store, (first, second) = run.clients.store, run.clients.store.client_ids()
    lent = store.load_personalised(second)
    assert lent is not None
    for user in example_users(run):
        client = run.clients.histories.client_of(run.data.interactions.user(user))
        found = compare_lists(run, trained, user)
        assert titles(found, "own") != titles(found, "other"), client
    store.save_personalised(dataclasses.replace(lent, client_id=first))
    for user in example_users(run):
        found = compare_lists(run, trained, user)
        assert titles(found, "own") == titles(found, "other")


def test_a_user_who_is_not_there_is_said(tiny_run: TinyRun) -> None:
    run = tiny_run()
    with pytest.raises(DataError, match="no user 'nobody'"):
        compare_lists(run, run.as_set(run.model.shared), "nobody")


# --- the file ---------------------------------------------------------------------------------


def test_the_examples_are_written_to_the_private_folder_alone(tiny_run: TinyRun) -> None:
    run = tiny_run(method="pfm")
    trained = evaluated(run)
    lists.write_lists(run, trained)
    path = run.folders.private / "lists.json"
    assert lists.read_lists(path) == [
        compare_lists(run, trained, user) for user in example_users(run)
    ]
    assert path.stat().st_mode & 0o077 == 0
    assert not list(run.folders.public.rglob("lists.json"))


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"lists": [{"user": "1"}]},
        {"lists": [{"user": "1", "history_length": 1, "newest": [], "lists": {"shared": [3]}}]},
    ],
)
def test_a_file_of_something_else_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"lists\.json holds no lists"):
        lists.read_lists(tmp_path / "lists.json")


# --- how they are shown -----------------------------------------------------------------------


def of_user(user: str = "42", **shown: list[tuple[str, bool]]) -> UserLists:
    return UserLists(
        user,
        history_length=7,
        newest=("Heat",),
        lists={name: tuple(Listed("i", *item) for item in items) for name, items in shown.items()},
    )


THREE = of_user(
    shared=[("Alien", False), ("Brazil", False)],
    own=[("Brazil", False), ("Casablanca", True)],
    other=[("Dune", True)],
)


def test_text_has_a_column_for_each_list_and_marks_new_titles() -> None:
    assert THREE.text().splitlines() == [
        "User 42 with 7 items in the history; the newest: Heat",
        "     shared part alone               with their private part         with another user's",
        " 1   Alien                           Brazil                        + Dune",
        " 2   Brazil                        + Casablanca",
    ]


@pytest.mark.parametrize(
    "title", ["word " * 30, "天" * 60, "e\u0301" * 80, "a天" * 30], ids=range(4)
)
def test_long_titles_are_cut_so_that_a_line_fits(title: str) -> None:
    row = [(title, True)]
    shown = of_user(shared=row, own=row, other=row).text()
    assert all(columns(line) <= 100 for line in shown.splitlines())
    assert shown.count("…") == 3


def test_text_passes_no_control_character_on() -> None:
    shown = of_user("\x1b[1mx", shared=[("\x1b[2Jre\x07d\r\n\u202eeye", False)]).text()
    assert all(c.isprintable() for line in shown.split("\n") for c in line)
    assert "�[2Jre�d �eye" in shown


def test_markdown_is_a_table_that_names_nobody_and_shows_no_history() -> None:
    assert THREE.markdown().splitlines() == [
        "A user with 7 items in the history.",
        "",
        "|  | shared part alone | with their private part | with another user's |",
        "| ---: | --- | --- | --- |",
        "| 1 | Alien | Brazil | + Dune |",
        "| 2 | Brazil | + Casablanca |  |",
    ]


def test_markup_in_a_title_is_text_in_markdown() -> None:
    shown = of_user(shared=[("<!-- a | *b* [c](d) `e` & \\ -->", False)]).markdown()
    row = shown.splitlines()[-1]
    assert row.count("|") == 3
    assert not set("<>*[]`\\") & set(row)
    assert "&lt;!-- a &#124; " in row
