"""From ``data.source`` to interactions: every kind of source, the cache, and clear refusals."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig, DataConfig
from pfm_llm.config.schema import ExperimentConfig, load_config
from pfm_llm.data import sources
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions

ROWS = "user_id,item_id,timestamp,title\nu,b,3,Birch\nu,a,1,Ash\nv,a,2,Ash\nu,c,2,Cedar\n"
CONFIGS = Path(__file__).parents[3] / "configs"
GAMES_FILES = {"source": "interactions", "items": "items"}
EXPECTED = {"u": ["a", "c", "b"], "v": ["a"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PFM_LLM_CACHE", str(folder))
    return folder / "interactions"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one whenever a source is parsed and not taken from the cache."""
    calls: list[object] = []
    validate = sources.validate

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return validate(*arguments)

    monkeypatch.setattr(sources, "validate", count)
    return calls


def load(source: object, seed: int = 0, **settings: Any) -> tuple[Interactions, LoadReport]:
    config = DataConfig(source=str(source), **{"min_interactions": 1, **settings})
    return load_interactions(config, seed)


def histories(interactions: Interactions) -> dict[str, list[str]]:
    ids = interactions.catalogue.item_ids
    return {
        user: [ids[item] for item in interactions.history(index)]
        for index, user in enumerate(interactions.user_ids)
    }


def table() -> dict[str, list[object]]:
    header, *lines = (line.split(",") for line in ROWS.splitlines())
    columns: dict[str, list[object]] = {
        name: list(values) for name, values in zip(header, zip(*lines, strict=True), strict=True)
    }
    return {**columns, "timestamp": [3, 1, 2, 2]}


def test_rows_with_titles(rows: Path) -> None:
    interactions, report = load(rows)
    assert histories(interactions) == EXPECTED
    assert interactions.catalogue.fields == {"title": ("Birch", "Ash", "Cedar")}
    assert report.num_rows == report.num_interactions == 4


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_mapping_of_columns_and_a_file_of_items(suffix: str, tmp_path: Path) -> None:
    content = datasets.Dataset.from_dict(
        {"who": [1, 1, 2], "what": [7, 8, 7], "position": [1, 0, 0], "stars": [1.5, 2.0, 3.0]}
    )
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        content.to_parquet(path)
    else:
        content.to_csv(path, sep="," if suffix == "csv" else "\t")
    (tmp_path / "items.tsv").write_text('what\tname\tmaker\n7\t"Ash" tree\tX\n8\tBirch\t\n9\tC\t\n')
    columns = ColumnsConfig(
        user="who", item="what", timestamp="position", rating="stars", title="name"
    )
    interactions, report = load(path, items=str(tmp_path / "items.tsv"), columns=columns)
    assert histories(interactions) == {"1": ["8", "7"], "2": ["7"]}
    assert interactions.catalogue.fields == {
        "title": ('"Ash" tree', "Birch", "C"),
        "maker": ("X", "", ""),
    }
    assert interactions.ratings is not None
    assert interactions.ratings.tolist() == [2.0, 1.5, 3.0]
    assert any("1 of 3 items of the catalogue have no inter" in note for note in report.notes)


def test_rows_without_timestamps_are_in_order(rows: Path) -> None:
    interactions, report = load(rows, columns=ColumnsConfig(timestamp=None))
    assert histories(interactions) == {"u": ["b", "a", "c"], "v": ["a"]}
    assert any(note.startswith("no timestamps") for note in report.notes)


def test_the_embedded_data_and_a_movielens_folder_are_the_same_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t4\t9\n1\t1\t3\t8\n"
    )
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tGodfather, The\t1972\tCrime Drama\n2\tToy Story\t1995\tComedy\n"
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t9\tF\tx\ty\n"
    )
    monkeypatch.setattr(sources.assets, "movielens_100k", lambda: folder)
    embedded, _ = load("movielens-100k")
    given, _ = load(folder)
    assert embedded.content_hash() == given.content_hash()
    assert histories(embedded) == {"1": ["1", "2"]}
    assert embedded.catalogue.fields["title"] == ("The Godfather", "Toy Story")
    assert embedded.user_fields == {"age": ("9",), "gender": ("F",), "occupation": ("x",)}
    with pytest.raises(DataError, match=r"data\.items: x\.csv cannot be used"):
        load("movielens-100k", items="x.csv")


def test_a_saved_dataset_also_of_splits_and_with_items(tmp_path: Path) -> None:
    content = datasets.Dataset.from_dict(table())
    content.save_to_disk(str(tmp_path / "one"))
    shuffled = content.select([1, 0, 2, 3])
    splits = datasets.DatasetDict({"test": content, "train": shuffled})
    splits.save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"all": content}).save_to_disk(str(tmp_path / "only"))
    for name in ("one", "splits", "only"):
        interactions, report = load(tmp_path / name)
        assert histories(interactions) == EXPECTED
        said = [note for note in report.notes if "only the split 'train' is read, not test" in note]
        assert len(said) == (name == "splits")
    items = datasets.Dataset.from_dict({"item_id": list("abc"), "title": list("ABC")})
    items.save_to_disk(str(tmp_path / "items"))
    interactions, _ = load(tmp_path / "one", items=str(tmp_path / "items"))
    assert interactions.catalogue.fields == {"title": ("A", "B", "C")}


def test_splits_without_train_are_a_question_for_the_user(tmp_path: Path) -> None:
    content = datasets.Dataset.from_dict(table())
    splits = datasets.DatasetDict({"a": content, "b": content})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="has the splits a, b and no split 'train'"):
        load(tmp_path / "splits")


def on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> None:
    """Let `datasets` find a data set of this name, which holds a Parquet file."""
    build: Callable[..., Any] = datasets.load_dataset_builder

    def found(asked: str, *_: Any, **__: Any) -> Any:
        assert asked == name
        builder = build("parquet", data_files=str(file))
        builder.hash = "c" * 40
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", found)


def test_a_dataset_id_is_loaded_through_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parses: list[object]
) -> None:
    datasets.Dataset.from_dict(table()).to_parquet(str(tmp_path / "one.parquet"))
    on_the_hub(monkeypatch, "someone/ratings", tmp_path / "one.parquet")
    for _ in range(2):
        interactions, report = load("someone/ratings")
        assert histories(interactions) == EXPECTED
        assert report.origins == (f"someone/ratings (data.source) at commit {'c' * 40}",)
    assert len(parses) == 1


def test_an_id_that_cannot_be_loaded_gives_the_reason_and_the_way_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError) as caught:
        load("someone/ratings")
    for part in ("'someone/ratings'", "Couldn't reach the Hub", "no network", "save_to_disk"):
        assert part in str(caught.value)


def test_texts_of_items_may_be_a_dataset_id(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"item_id": ["a", "b", "c"], "title": ["Ash", "Birch", "Cedar"]}
    items = datasets.Dataset.from_dict(texts)
    items.to_parquet(str(tmp_path / "items.parquet"))
    on_the_hub(monkeypatch, "someone/items", tmp_path / "items.parquet")
    _, report = load(rows, items="someone/items")
    assert report.origins == (f"someone/items (data.items) at commit {'c' * 40}",)


def test_the_second_load_comes_from_the_cache_and_is_equal(
    rows: Path, cache: Path, parses: list[object]
) -> None:
    first, first_report = load(rows)
    second, second_report = load(rows)
    assert len(parses) == 1
    assert second.content_hash() == first.content_hash()
    assert second_report == first_report
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("settings", "is_new"),
    [
        ({"split": "global_temporal"}, False),
        ({"seed": 1}, False),
        ({"min_interactions": 2}, True),
        ({"repeats": "allow"}, True),
        ({"max_users": 1}, True),
        ({"columns": ColumnsConfig(timestamp=None)}, True),
        ({"max_bad_rows": 0.5}, True),
    ],
)
def test_the_cache_is_used_unless_something_that_matters_changed(
    settings: dict[str, Any], is_new: bool, rows: Path, parses: list[object]
) -> None:
    load(rows)
    load(rows, **settings)
    assert len(parses) == 1 + is_new


def test_with_a_sample_of_users_the_seed_matters(rows: Path, parses: list[object]) -> None:
    load(rows, seed=0, max_users=1)
    load(rows, seed=0, max_users=1)
    load(rows, seed=1, max_users=1)
    assert len(parses) == 2


def test_other_content_under_the_same_name_is_read_anew(rows: Path) -> None:
    load(rows)
    rows.write_text(ROWS + "v,b,9,Birch\n")
    assert histories(load(rows)[0]) == {**EXPECTED, "v": ["a", "b"]}


def test_other_item_texts_are_read_anew(rows: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    for title in ("Ash", "Alder"):
        items.write_text(f"item_id,title\na,{title}\nb,Birch\nc,Cedar\n")
        interactions, _ = load(rows, items=str(items))
        assert interactions.catalogue.fields["title"][0] == title


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    damage: str, rows: Path, cache: Path, parses: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    load(rows)
    [victim] = cache.glob("*/interactions/*.arrow")
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-40])
    else:
        victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert histories(load(rows)[0]) == EXPECTED
    assert "damaged" in caplog.text
    caplog.clear()
    assert histories(load(rows)[0]) == EXPECTED
    assert (len(parses), caplog.text) == (2, "")


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(
    rows: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert histories(load(rows)[0]) == EXPECTED
    assert "could not be cached" in caplog.text


def test_a_load_that_fails_leaves_nothing_in_the_cache(rows: Path, cache: Path) -> None:
    rows.write_text(ROWS + ",b,9,Birch\n")
    with pytest.raises(DataError, match=r"rows\.csv line 6: empty user id"):
        load(rows)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/none.csv", "none.csv does not exist"),
        ("{tmp}/none", "none does not exist"),
        ("ratings.tsv", "ratings.tsv does not exist"),
        ("movielens-100", "did you mean movielens-100k?"),
        ("MovieLens100K", "did you mean movielens-100k?"),
        ("{tmp}/other", "no folder of MovieLens, RecBole, MIND or .* it holds: a.txt"),
        ("{tmp}/empty", "it holds: nothing"),
        ("{tmp}/broken", "cannot be read as a folder that datasets.save_to_disk wrote"),
        ("{tmp}/other/a.txt", "a.txt is empty; its first line must name the columns"),
    ],
)
def test_a_source_that_is_none_is_named_with_a_remedy(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing should be asked of the network")

    monkeypatch.setattr(datasets, "load_dataset_builder", asked)
    for name in ("other", "empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "a.txt").write_text("")
    (tmp_path / "broken" / "state.json").write_text("{")
    with pytest.raises(DataError, match=message):
        load(source.format(tmp=tmp_path))


def test_a_missing_file_of_items_is_named(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items\.csv does not exist"):
        load(rows, items=str(tmp_path / "items.csv"))


def test_one_item_and_no_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("user_id,item_id,timestamp,title\nu,a,1,Ash\n")
    with pytest.raises(DataError, match="at least 2 items"):
        load(path)
    path.write_text("user_id,item_id,timestamp,title\n")
    with pytest.raises(DataError, match="no interactions left of 0 rows"):
        load(path)


def test_the_config_for_games_reads_its_two_files_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "interactions.tsv").write_text(
        "user_id\titem_id\tposition\n0\t1\t1\n0\t0\t0\n0\t2\t2\n1\t0\t0\n1\t2\t1\n1\t1\t2\n"
    )
    (tmp_path / "items.tsv").write_text('item_id\ttitle\n0\tPong\n1\tR&amp;C\n2\t"Zork" I\n')
    config = load_config(
        CONFIGS / "games.yaml",
        [f"data.{name}={tmp_path / file}.tsv" for name, file in GAMES_FILES.items()],
    )
    interactions, report = load_interactions(config.data, config.seed)
    assert histories(interactions) == {"0": ["0", "1", "2"], "1": ["0", "2", "1"]}
    assert interactions.catalogue.fields == {"title": ("Pong", "R&C", '"Zork" I')}
    assert interactions.timestamps is not None
    assert report.dropped == {}


def settings_but_length(config: ExperimentConfig) -> dict[str, Any]:
    """All but the data and what follows from their size: how long to train, when to look."""
    apart = dict.fromkeys(("name", "data", "evaluation", "output"), True)
    tree: dict[str, Any] = config.model_dump(
        exclude={**apart, "federation": {"num_rounds", "cohort_size"}}
    )
    return tree


def test_the_configs_of_the_other_domains_train_as_that_of_films() -> None:
    films, games, groceries = (
        load_config(CONFIGS / f"{name}.yaml") for name in ("ml100k", "games", "groceries")
    )
    films_settings = settings_but_length(films)
    assert settings_but_length(games) == films_settings
    assert settings_but_length(groceries) == films_settings
    assert (games.data.source, games.data.items) == (
        "data/games/interactions.tsv", "data/games/items.tsv",
    )  # fmt: skip
    assert groceries.data.source == "completejourney"
    assert groceries.data.repeats == "first_only"
    assert groceries.data.keep_ties


def test_a_format_that_prescribes_its_layout_refuses_another(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    with pytest.raises(DataError, match=r"kind RecBole prescribes .*; leave separator out of"):
        load(tmp_path / "mine.inter", reading={"separator": ";"})
    with pytest.raises(DataError, match=r"data\.reading\.items: there is no file of items"):
        load(rows, reading={"items": {"separator": ";"}})


def test_each_of_two_files_is_read_in_its_own_way(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("u;7;1\nu;8;2\n")
    (tmp_path / "items.csv").write_bytes("7|Äpfel\n8|Öl\n".encode("cp850"))
    interactions, _ = load(
        tmp_path / "events.csv",
        items=str(tmp_path / "items.csv"),
        columns={"user": "column_1", "item": "column_2", "timestamp": "column_3",
                 "items_item": "column_1", "title": "column_2"},
        reading={"separator": ";", "header": False,
                 "items": {"separator": "|", "header": False, "encoding": "cp850"}},
    )  # fmt: skip
    assert interactions.catalogue.fields["title"] == ("Äpfel", "Öl")
    assert histories(interactions) == {"u": ["7", "8"]}
