"""Nothing held out is visible to training: not in a window, a token, a cache or a statistic.

That is: no held-out item, no rating of one, and no like that follows from a rating. The strongest
form comes first: change all that is held out, and training gives the same bits. Training takes
its cross-entropy over the whole catalogue, so there are no training negatives that could give a
held-out item away by never being drawn; the last test holds that.
"""

import ast
import gc
import random
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.config.choices import SplitKind
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.splits import HeldOut, Split, TrainData
from pfm_llm.federation.rounds import run_rounds
from pfm_llm.runs import measuring
from pfm_llm.runs.experiment import make_federation
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import Corpus, Run, assemble, load_corpus
from pfm_llm.text.encoding import NO_TARGET
from tests.support.leaks import files_below
from tests.support.tiny import TITLES, Tiny, alone, write_items

NUM_ITEMS, NUM_USERS = 50, 12
CANARIES = range(30, NUM_ITEMS)
CANARY_RATING = 100.25
"""Held-out events of the canaries are rated from here on, and nothing else is."""

Rate = Callable[[str, int, int], float]
"""The rating of an event: user, place in the history, length of the history."""
PACKAGE = Path(__file__).parents[2] / "pfm_llm"


def one_to_five(user: str, place: int, length: int) -> float:
    return float(1 + (int(user[1:]) + place) % 5)


def write_rated(path: Path, histories: dict[str, list[int]], rate: Rate) -> Path:
    """A CSV of histories, users interleaved, with a rating for each event, a minute apart."""
    rows = sorted(
        (place, user, item, rate(user, place, len(items)))
        for user, items in histories.items()
        for place, item in enumerate(items)
    )
    lines = [f"{user},i{item},{60 * place},{rating}" for place, user, item, rating in rows]
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *lines, ""]))
    return path


def config_of(
    tiny: Tiny,
    folder: Path,
    histories: dict[str, list[int]],
    rate: Rate = one_to_five,
    **settings: Any,
) -> ExperimentConfig:
    folder.mkdir(parents=True, exist_ok=True)
    titles = [*TITLES, *(f"zebra {number}" for number in CANARIES)]
    return tiny.config(
        folder,
        data__source=str(write_rated(folder / "interactions.csv", histories, rate)),
        data__items=str(write_items(folder / "items.csv", titles)),
        data__columns__rating="rating",
        federation__num_rounds=3,
        federation__local__private_local_steps=2,
        **settings,
    )


def wired(config: ExperimentConfig) -> Run:
    folders = RunFolders.of(Path(config.output.dir) / config.name)
    return assemble(config, load_corpus(config), folders, alone())


def trained(config: ExperimentConfig) -> tuple[Run, dict[str, torch.Tensor], dict[str, bytes]]:
    """After the rounds and nothing else: the server's tensors and the clients' files."""
    run = wired(config)
    federation = make_federation(run)
    run_rounds(federation, 1, lambda _: {})
    private = files_below(run.folders.private / "clients")
    return run, federation.server.state_tensors(), private


def distinct_histories(seed: int = 0) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {
        f"u{u:02d}": draw.sample(range(NUM_ITEMS), draw.randint(8, 14)) for u in range(NUM_USERS)
    }


def with_other_held_out_items(
    histories: dict[str, list[int]], split: Split
) -> dict[str, list[int]]:
    """The same train events, and in place of every held-out item one that the user never met."""
    offsets = split.train.interactions.offsets
    swapped = {}
    for user, (user_id, items) in enumerate(histories.items()):
        kept = int(offsets[user + 1] - offsets[user])
        fresh = [item for item in range(NUM_ITEMS) if item not in items]
        swapped[user_id] = items[:kept] + fresh[: len(items) - kept]
    return swapped


@pytest.mark.parametrize(
    "read",
    [
        # so that training reads the ratings it may see
        {"window__reading": "tokens", "prompt": "next_item_ratings.v1"},
        {"window__reading": "items"},
    ],
    ids=["tokens", "items"],
)
@pytest.mark.parametrize("kind", list(SplitKind))
def test_training_gives_the_same_bits_whatever_is_held_out(
    kind: SplitKind, read: dict[str, str], tiny: Tiny, tmp_path: Path
) -> None:
    histories = distinct_histories()
    settings = {"data__split": kind.value, "data__held_out": 0.3, **read}
    config = config_of(tiny, tmp_path / "a", histories, **settings)
    split = load_corpus(config).split
    swapped = with_other_held_out_items(histories, split)
    num_train = dict(zip(histories, np.diff(split.train.interactions.offsets), strict=True))

    def other_held_out_ratings(user: str, place: int, length: int) -> float:
        rating = one_to_five(user, place, length)
        return rating if place < num_train[user] else 1 + rating % 5

    other_config = config_of(tiny, tmp_path / "b", swapped, other_held_out_ratings, **settings)
    other_split = load_corpus(other_config).split
    for name in ("validation", "test"):
        ours, theirs = getattr(split, name), getattr(other_split, name)
        for items, others in zip(ours.targets, theirs.targets, strict=True):
            assert not np.isin(items, others).any()
        for ratings, others in zip(ours.target_ratings, theirs.target_ratings, strict=True):
            assert (ratings != others).all()

    run, server, private = trained(config)
    other, other_server, other_private = trained(other_config)
    assert server.keys() == other_server.keys()
    assert all(torch.equal(server[name], other_server[name]) for name in server)
    assert any(name.endswith(".safetensors") and "private.r" in name for name in private)
    # Cache entries are named by their content.
    assert any("trunk" in name for name in private) == (read["window__reading"] == "tokens")
    assert private == other_private
    assert run.clients.histories.trainable == other.clients.histories.trainable


def test_another_train_item_does_change_the_bits(tiny: Tiny, tmp_path: Path) -> None:
    histories = distinct_histories()
    changed = {**histories}
    for user_id, items in histories.items():
        fresh = next(item for item in range(NUM_ITEMS) if item not in items)
        changed[user_id] = [fresh, *items[1:]]
    _, server, _ = trained(config_of(tiny, tmp_path / "a", histories))
    _, other, _ = trained(config_of(tiny, tmp_path / "b", changed))
    assert not all(torch.equal(server[name], other[name]) for name in server)


# --- canaries: items that nobody has but as a held-out one -----------------------------------


@pytest.fixture(scope="module")
def canaries(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each user's last two items are canaries, so no training may hold any of them."""
    draw = random.Random(1)
    histories = {
        f"u{u:02d}": draw.sample(range(30), draw.randint(5, 11)) + draw.sample(CANARIES, 2)
        for u in range(NUM_USERS)
    }

    def rate(user: str, place: int, length: int) -> float:
        is_train = place < length - 2
        return one_to_five(user, place, length) if is_train else CANARY_RATING + int(user[1:])

    folder = tmp_path_factory.mktemp("canaries")
    # Nobody meets a canary in training: where that is learned, it is no negative either.
    return wired(config_of(tiny.by_tokens, folder, histories, rate, head__item_met=False))


def test_training_windows_hold_the_train_history_and_nothing_else(canaries: Run) -> None:
    corpus, histories = canaries.data, canaries.clients.histories
    for user in range(NUM_USERS):
        history = corpus.interactions.history(user)
        windows = histories.windows(histories.client_of(user))
        read = np.concatenate([window.items for window in windows])
        targets = np.concatenate([window.targets for window in windows])
        assert read.tolist() == history[:-2].tolist()
        assert targets[targets != NO_TARGET].tolist() == history[1:-2].tolist()
        assert not np.isin([*read, *targets], CANARIES).any()
        for window in windows:
            text = canaries.model.backbone.tokenizer.decode(window.tokens.tolist())
            assert "zebra" not in text
            assert len(window.items) == text.count("\n") - 1  # less the header's line


def test_validation_reads_train_and_test_reads_validation_too(canaries: Run) -> None:
    corpus = canaries.data
    for user in range(NUM_USERS):
        history = corpus.interactions.history(user).tolist()
        validation, test = corpus.split.validation, corpus.split.test
        assert validation.histories[user].tolist() == history[:-2]
        assert validation.targets[user].tolist() == history[-2:-1]
        assert test.histories[user].tolist() == history[:-1]
        assert test.targets[user].tolist() == history[-1:]


def reachable_from(*roots: Any) -> Iterator[Any]:
    """Every object that some objects lead to, by attributes, items, closures and bases."""
    seen: set[int] = set()
    to_do = list(roots)
    while to_do:
        item = to_do.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType | str | bytes):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, types.FunctionType):
            # Not its globals, from which every module is reached.
            to_do += [cell.cell_contents for cell in item.__closure__ or ()]
            to_do += item.__defaults__ or ()
        elif isinstance(item, np.ndarray):
            to_do.append(item.base)
        else:
            to_do += gc.get_referents(item)


def held_out_things(corpus: Corpus, *roots: Any, labels: Sequence[np.ndarray] = ()) -> list[Any]:
    """What is reachable and is, shares memory with, or is a copy of, held-out data.

    Copies are found by the canaries' ratings, and by identity where ``labels`` names them.
    """
    arrays = [corpus.interactions.items, corpus.interactions.offsets, *labels]
    assert corpus.interactions.ratings is not None
    arrays.append(corpus.interactions.ratings)
    for held_out in (corpus.split.validation, corpus.split.test):
        arrays += [held_out.users, *held_out.histories, *held_out.targets]
        arrays += [*(held_out.history_ratings or ()), *(held_out.target_ratings or ())]
    found = []
    for item in reachable_from(*roots):
        if isinstance(item, HeldOut | Split) or item is corpus.interactions:
            found.append(item)
        elif isinstance(item, torch.Tensor):
            found += held_out_array(item.detach().cpu().numpy(), arrays)
        elif isinstance(item, np.ndarray):
            found += held_out_array(item, arrays)
        elif isinstance(item, float) and item >= CANARY_RATING and item % 1 == 0.25:
            found.append(item)
    return found


def held_out_array(item: np.ndarray, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    is_float = item.dtype.kind == "f"
    if is_float and ((item >= CANARY_RATING) & (item % 1 == 0.25)).any():
        return [item]
    return [item for array in arrays if np.shares_memory(item, array)]


def test_no_held_out_data_can_be_reached_from_training(canaries: Run) -> None:
    corpus = canaries.data
    for client_id in canaries.clients.histories.clients:
        canaries.clients.histories.windows(client_id)
    roots = (canaries.clients.trainer, canaries.clients.histories, corpus.split.train)
    walked = list(reachable_from(*roots))
    assert any(isinstance(item, TrainData) for item in walked)
    assert any(item is canaries.model.model for item in walked)
    threshold = canaries.config.data.like_threshold
    labels = [*corpus.split.validation.liked(threshold), *corpus.split.test.liked(threshold)]
    assert held_out_things(corpus, *roots, labels=labels) == []


def test_no_rating_or_like_of_a_held_out_item_can_be_reached_unnoticed(
    canaries: Run,
) -> None:
    """The walk finds each form in which a trainer might hold a label."""
    corpus = canaries.data
    for held_out in (corpus.split.validation, corpus.split.test):
        assert held_out.target_ratings is not None
        ratings, [liked, *_] = held_out.target_ratings, held_out.liked(4.0)
        numbers = ratings[0].tolist()
        for leak in (
            ratings,
            ratings[0][:1],
            torch.from_numpy(ratings[3]),
            np.array(ratings[3]),  # a copy
            {"user": torch.tensor(ratings[5])},
            lambda kept=numbers: kept,
            held_out.liked,
            [liked[:]],
            torch.from_numpy(liked),
        ):
            roots = (canaries.clients.trainer, canaries.clients.histories, corpus.split.train, leak)
            assert held_out_things(corpus, *roots, labels=[liked]), leak
    train = corpus.split.train.interactions
    assert train.ratings is not None
    assert train.ratings.max() <= 5


def test_a_trainer_that_sees_everything_is_caught(canaries: Run) -> None:
    corpus = canaries.data
    histories = ClientHistories(
        list(canaries.clients.histories.clients.values()),
        TrainData(corpus.interactions),
        canaries.model.encoder,
        canaries.clients.cache.states,
    )
    trainer = LocalTrainer(
        canaries.config,
        canaries.model.model,
        histories,
        canaries.clients.store,
        canaries.model.contract,
    )
    assert held_out_things(corpus, trainer)
    view = corpus.interactions.items[:5]  # an innocent look, and all the rest behind it
    assert held_out_things(corpus, [view])
    assert held_out_things(corpus, lambda: corpus)


def test_baselines_know_nothing_of_held_out_items(canaries: Run) -> None:
    fitted = measuring.fit_run_baselines(canaries)
    assert [baseline.name for baseline in fitted] == ["popularity", "ease", "markov_recency"]
    train = canaries.data.split.train.interactions
    histories = [train.history(user) for user in range(NUM_USERS)]
    for baseline in fitted:
        scores = np.asarray(baseline.score(histories))
        canary_scores = scores[:, CANARIES.start :]
        # Nobody met them in training, so all canaries score alike, for every user.
        assert np.ptp(canary_scores) == 0, baseline.name
    popularity = np.asarray(fitted[0].score(histories))
    assert (popularity[:, CANARIES.start :] <= popularity.min(axis=1, keepdims=True)).all()


def test_choices_of_baselines_do_not_depend_on_test_items(tiny: Tiny, tmp_path: Path) -> None:
    histories = distinct_histories()
    other = {
        user: [*items[:-1], next(i for i in range(NUM_ITEMS) if i not in items)]
        for user, items in histories.items()
    }
    chosen = [
        [
            (baseline.name, dict(baseline.hyperparameters), baseline.validation_ndcg)
            for baseline in measuring.fit_run_baselines(wired(config_of(tiny, tmp_path / name, h)))
        ]
        for name, h in (("a", histories), ("b", other))
    ]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("room", ["client", "federation", "model", "server"])
def test_training_draws_no_candidates(room: str) -> None:
    paths = list((PACKAGE / room).rglob("*.py"))
    assert paths
    imported = {
        f"{node.module}.{alias.name}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not [name for name in imported if "candidates" in name or "evaluation" in name]


def test_an_update_pushes_all_unseen_items_alike(canaries: Run) -> None:
    # With one gradient step the bias moves by one-hot minus softmax: up for the client's own
    # training targets, down for all others. A held-out item is among the others.
    client_id = canaries.clients.histories.client_of(0)
    update = canaries.clients.trainer.train_chunk((client_id,), canaries.model.shared)[0]
    bias = update.delta["head.item_bias"].numpy()
    history = canaries.data.interactions.history(0)
    targets = set(history[1:-2].tolist())
    assert all((bias[item] > 0) == (item in targets) for item in range(NUM_ITEMS))
    held_out = bias[history[-2:]]
    others = bias[[item for item in CANARIES if item not in history]]
    assert others.min() < held_out.max()
    assert held_out.min() < others.max()
