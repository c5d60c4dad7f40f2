"""An adapter on another catalogue: published, served untrained, and adapted in a few rounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.transfer import METHODS
from benchmarks.transferring import figures, serving
from benchmarks.transferring.worlds import World, halves
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.run import load_corpus
from tests.support.tiny import Tiny

BOOKS = {"text_books": 1, "text_size": 4, "hash_books": 2, "hash_size": 16, "met_size": 64}
KINDS = sorted(METHODS)


def _train(tiny: Tiny, world: World, output: Path, kind: str, adapter: Path | None = None) -> Path:
    data = world.data | {"min_interactions": 2}
    settings: dict[str, Any] = {
        "data": data, "tasks": ["next_item"], "evaluation__baselines": [],
        "method": METHODS[kind]["method"], "name": f"{kind}-{adapter is None}",
    }  # fmt: skip
    settings |= {f"head__{key}": value for key, value in METHODS[kind].get("head", {}).items()}
    if kind == "codes":
        settings["head__codes"] = BOOKS
    if adapter is not None:
        settings["init_from__adapter"] = str(adapter)
    return run_experiment(tiny.config(output, **settings))


@pytest.fixture(scope="module")
def worlds(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    folder = tmp_path_factory.mktemp("worlds")
    films = load_corpus(tiny.config(folder)).interactions
    return halves(films, folder, 0)


def test_the_halves_share_neither_users_nor_items(
    tiny: Tiny, worlds: tuple[World, World], tmp_path: Path
) -> None:
    whole = load_corpus(tiny.config(tmp_path)).interactions
    found = [
        load_corpus(tiny.config(tmp_path, data=one.data | {"min_interactions": 1})).interactions
        for one in worlds
    ]
    assert not set.intersection(*(set(one.user_ids) for one in found))
    ids = [set(one.catalogue.item_ids) for one in found]
    assert not set.intersection(*ids)
    assert set.union(*ids) == set(whole.catalogue.item_ids)
    for one in found:
        for user in one.user_ids:
            mine, all_of = one.history(one.user(user)), whole.history(whole.user(user))
            kept = [whole.catalogue.item_ids[item] for item in all_of.tolist()]
            kept = [item for item in kept if item in one.catalogue.item_ids]
            assert [one.catalogue.item_ids[item] for item in mine.tolist()] == kept


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_serves_items_that_it_never_saw_and_goes_on_from_there(
    kind: str,
    tiny: Tiny,
    worlds: tuple[World, World],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = worlds
    published = serving.published(_train(tiny, source, tmp_path, kind), tmp_path / "published")
    load = Recommender.from_pretrained

    def with_base(*words: Any, **more: Any) -> Recommender:
        return load(*words, **more, backbone=str(tiny.model))

    monkeypatch.setattr(Recommender, "from_pretrained", with_base)
    model = with_base(published, catalogue=str(target.items))
    assert model.alignment.num_kept == 0
    assert model.is_new.all()
    first, second = model.catalogue.item_ids[:2]
    scores = model.score([first])
    assert len(set(scores.tolist())) == len(scores)
    assert not np.allclose(scores, model.score([second]))
    assert len(model.recommend([first, second], k=5)) == 5

    adapted = _train(tiny, target, tmp_path, kind, published)
    again = serving.published(adapted, tmp_path / "adapted")
    assert read_artefact(again).manifest.parents[0].relation == "trained_from"
    served = with_base(again, catalogue=str(target.items))
    assert served.alignment.num_kept == len(served.catalogue)
    # The whitening that the adaptation went on with is that of the untrained serving.
    torch.testing.assert_close(served.parts.model.item_texts, model.parts.model.item_texts)

    data = load_corpus(tiny.config(tmp_path, data=target.data | {"min_interactions": 2}))
    ranks = serving.served(again, target.items, data, "serving", (serving.SHARED,))
    test = data.split.test
    assert len(ranks[serving.SHARED]) == len(test.users)
    met = np.array([len(np.unique(history)) for history in test.histories])
    asked = figures.Asked(tuple(map(str, test.users)), len(served.catalogue) - met)
    found = {name: figures.qualities(ranks[serving.SHARED], asked) for name in ("a", "b")}
    rows = figures.rows({**found, figures.RANDOM: figures.by_chance(asked)}, [("a", "b")])
    difference = next(row for row in rows if row["metric"] == "a_over_b_ndcg")
    assert difference["value"] == 0
    assert 0 <= next(row["value"] for row in rows if row["metric"] == "a_percentile") <= 1
