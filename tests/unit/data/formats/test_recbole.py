"""RecBole's atomic files of any name: the file or its folder, with or without items."""

from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import DataConfig
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.sources import load_interactions


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "steam"
    place.mkdir()
    (place / "steam.inter").write_text(
        "user_id:token\tproduct_id:token\ttimestamp:float\tplay_hours:float\n"
        "u\t1\t0.5\t3\nu\t2\t0.25\t4\n"
    )
    return place


def add_items(folder: Path) -> None:
    (folder / "steam.item").write_text(
        "product_id:token\tapp_name:token_seq\tgenres:token_seq\n"
        "1\tHalf-Life\tAction FPS\n2\tIco\t\n"
    )


def load(source: Path, items: Path | None = None) -> Interactions:
    asked = {"source": str(source), "items": items and str(items), "min_interactions": 1}
    return load_interactions(DataConfig.model_validate(asked), seed=0)[0]


@pytest.mark.parametrize("name", ["", "steam.inter"])
def test_a_data_set_is_its_folder_or_its_file(name: str, folder: Path) -> None:
    add_items(folder)
    (folder / "steam.user").write_text("user_id:token\tcountry:token\nu\tNL\n")
    interactions = load(folder / name)
    assert interactions.items.tolist() == [1, 0]
    assert interactions.catalogue.fields == {
        "title": ("Half-Life", "Ico"), "genres": ("Action FPS", ""),
    }  # fmt: skip
    assert interactions.user_fields == {"country": ("NL",)}


def test_texts_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name a file of item texts in data\.items"):
        load(folder)
    items = tmp_path / "texts.csv"
    items.write_text("product_id,title\n1,One\n2,Two\n")
    assert load(folder, items).catalogue.fields["title"] == ("One", "Two")


def test_one_of_several_data_sets_must_be_named(folder: Path) -> None:
    add_items(folder)
    (folder / "other.inter").write_text("user_id:token\titem_id:token\n")
    with pytest.raises(DataError, match=r"several data sets: other\.inter, steam\.inter; name one"):
        load(folder)
    assert load(folder / "steam.inter").num_interactions == 2
