"""What can be wrong with items, encoders and codes: each is said, with what to do about it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, ContractError, CorruptFileError, DataError
from pfm_llm.data.interactions import Catalogue
from pfm_llm.publish.artefact import HEAD_FILE, MANIFEST_FILE, read_artefact
from pfm_llm.publish.manifest import Manifest
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.opening import open_run
from tests.support.tiny import TITLES, Tiny, write_encoder, write_items

SETTINGS: dict[str, Any] = {
    "method": "pfm",
    "tasks": ["next_item"],
    "federation__num_rounds": 2,
    "evaluation__baselines": [],
}
CODES: dict[str, Any] = {
    "head__item_ids": "codes",
    "head__codes": {
        "text_books": 1, "text_size": 5, "hash_books": 2, "hash_size": 16, "met_size": 64,
    },
}  # fmt: skip
ONE_TEXT = r"all 30 items have one text, 'same', so .* \(data\.columns\.title\)"


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny.config(tmp_path_factory.mktemp("plain"), **SETTINGS))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``enc<w>`` of text encoders, each of another width w."""
    folder = tmp_path_factory.mktemp("encoders")
    for width in (24, 16, 6):
        write_encoder(folder / f"enc{width}", None, width)
    return folder


@pytest.fixture(scope="module")
def encoded(tiny: Tiny, encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose items were read by an encoder in a folder."""
    output, items = tmp_path_factory.mktemp("encoded"), {"encoder": str(encoders / "enc24")}
    return run_experiment(tiny.config(output, items=items, **SETTINGS)) / "shared_adapter"


def _serve(run: Path, tiny: Tiny, catalogue: Catalogue | str, **bases: Any) -> Recommender:
    bases = {"backbone": str(tiny.model), **bases}
    return Recommender.from_pretrained(run, catalogue=catalogue, **bases)


def _trained_on(
    texts: Path, tiny: Tiny, output: Path, adapter: Path | None = None, **settings: Any
) -> Path:
    start = {} if adapter is None else {"init_from__adapter": str(adapter)}
    settings = {**SETTINGS, "data__items": str(texts), **start, **settings}
    return run_experiment(tiny.config(output, **settings))


def test_an_item_without_a_text_is_named(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    titles = ["" if number == 7 else title for number, title in enumerate(TITLES)]
    items, adapter = write_items(tmp_path / "items.csv", titles), run / "shared_adapter"
    catalogue = Catalogue(tuple(f"i{n}" for n in range(30)), {"title": tuple(titles)})
    with pytest.raises(DataError, match=r"item 'i7': .* with no text .*; give the item a title"):
        _serve(adapter, tiny, catalogue)
    for attempt in (
        lambda: _serve(adapter, tiny, str(items)),
        lambda: _trained_on(items, tiny, tmp_path / "a"),
        lambda: _trained_on(items, tiny, tmp_path / "b", adapter),
    ):
        with pytest.raises(DataError, match=r"correct them[\s\S]* line 9: item without text"):
            attempt()


def test_a_catalogue_of_equal_texts_is_refused(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    items, adapter = write_items(tmp_path / "items.csv", ["same"] * 30), run / "shared_adapter"
    for attempt in (
        lambda: _serve(adapter, tiny, str(items)),
        lambda: _trained_on(items, tiny, tmp_path / "a"),
        lambda: _trained_on(items, tiny, tmp_path / "b", **CODES),
        lambda: _trained_on(items, tiny, tmp_path / "c", adapter),
    ):
        with pytest.raises(DataError, match=ONE_TEXT):
            attempt()


@pytest.mark.parametrize("width", [16, 6])
def test_an_encoder_of_another_width_is_refused_by_both_names(
    width: int, encoded: Path, encoders: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """Also where it is narrower than head.dim, of which nothing is then said."""
    other = str(encoders / f"enc{width}")
    wanted = rf"an encoder of .* with 24 numbers, .*enc{width} are of .* with {width} numbers; set"
    with pytest.raises(ArtefactError, match=wanted):
        _trained_on(tiny.items, tiny, tmp_path, encoded, items={"encoder": other})
    with pytest.raises(ArtefactError, match=wanted):
        _serve(encoded, tiny, str(tiny.items), item_encoder=other)
    with pytest.raises(ArtefactError, match=r"backbone are of the base model with 32 numbers"):
        _trained_on(tiny.items, tiny, tmp_path, encoded)


def test_an_encoder_in_a_folder_is_named_where_it_is(
    encoded: Path, encoders: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=r"local encoder .* called 'enc24'; pass item_encoder"):
        _serve(encoded, tiny, str(tiny.items))
    moved = shutil.copytree(encoders / "enc24", tmp_path / "elsewhere")
    served = _serve(encoded, tiny, str(tiny.items), item_encoder=str(moved))
    assert len(served.recommend(["i3"], k=3)) == 3
    started = _trained_on(tiny.items, tiny, tmp_path, encoded, items={"encoder": str(moved)})
    assert (started / "results.json").is_file()


def test_a_manifest_cannot_have_an_encoder_s_path_opened(
    encoded: Path, encoders: Path, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(encoded, tmp_path / "hostile")
    manifest = Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes(), "it")
    for name in (str(encoders / "enc24"), "..", "~/enc24"):
        items = manifest.items.model_copy(update={"encoder": name})
        changed = manifest.model_copy(update={"items": items})
        (folder / MANIFEST_FILE).write_bytes(changed.to_bytes())
        with pytest.raises(ArtefactError, match="pass item_encoder"):
            _serve(folder, tiny, str(tiny.items))


def test_codes_of_another_catalogue_s_centroids_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """In a folder by the hash of its file, and in a federation by the contract of its updates."""
    titles = [f"{title} again" for title in reversed(TITLES)]
    items = write_items(tmp_path / "items.csv", titles)
    ours = _trained_on(tiny.items, tiny, tmp_path / "a", **CODES)
    theirs = _trained_on(items, tiny, tmp_path / "b", **CODES)
    one, other = (read_artefact(run / "shared_adapter") for run in (ours, theirs))
    centroids = one.code_centroids(), other.code_centroids()
    assert centroids[0] is not None
    assert centroids[1] is not None
    assert not torch.equal(*centroids)

    mixed = shutil.copytree(ours / "shared_adapter", tmp_path / "mixed")
    tensors, header = files.read_tensors(mixed / HEAD_FILE)
    files.write_tensors(mixed / HEAD_FILE, {**tensors, "codes.centroids": centroids[1]}, header)
    with pytest.raises(CorruptFileError, match=r"not the file that the manifest lists.*again"):
        _serve(mixed, tiny, str(tiny.items))

    # A model that starts from an adapter takes its centroids, whatever its own texts are.
    going_on = _trained_on(items, tiny, tmp_path / "c", ours / "shared_adapter", **CODES)
    kept = read_artefact(going_on / "shared_adapter").code_centroids()
    assert torch.equal(kept, centroids[0])
    server, client = (open_run(run)[0].model.contract for run in (theirs, going_on))
    assert server.tensors == client.tensors
    zeros = {name: torch.zeros(spec.shape) for name, spec in client.tensors.items()}
    with pytest.raises(ContractError, match=r"codes of items .* differ; give it the config"):
        server.check(client.build("user-u0", 1, 3, 0.5, zeros), 1)
