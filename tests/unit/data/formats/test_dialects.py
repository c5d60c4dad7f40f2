"""One table, written in each usual dialect, is read back equal without any column named."""

import csv
import gzip
import io
import itertools
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm_llm.config.data import DataConfig
from pfm_llm.data.frames import data_section
from pfm_llm.data.interactions import build_interactions
from pfm_llm.data.rows import validate
from pfm_llm.data.sources import read_source

START = 1_500_000_000
NO_RATING = -1.0
UNRATED = {"MIND"}


class Event(NamedTuple):
    """One row: the rating in halves, the time in seconds."""

    user: str
    item: str
    rating: float
    time: int


class Corpus(NamedTuple):
    """Events, and the title of each item."""

    events: tuple[Event, ...]
    titles: dict[str, str]


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """A few users with distinct times; titles with the marks of all dialects, except line ends."""
    letters = st.sampled_from("abAZ ,;'&()-é")
    text = st.text(letters, min_size=1, max_size=12).map(lambda t: f"T{' '.join(t.split())}x")
    items = [str(100 + n) for n in range(draw(st.integers(3, 6)))]
    titles = draw(st.lists(text, min_size=len(items), max_size=len(items)))
    pairs = draw(
        st.lists(
            st.tuples(st.sampled_from(["7", "8"]), st.sampled_from(items)),
            min_size=3, max_size=10, unique=True,
        )
    )  # fmt: skip
    gaps = draw(st.permutations(range(len(pairs))))
    ratings = st.sampled_from([0.5, 1.0, 3.5, 5.0])
    events = (
        Event(user, item, draw(ratings), START + 1000 * gap)
        for (user, item), gap in zip(pairs, gaps, strict=True)
    )
    return Corpus(tuple(events), dict(zip(items, titles, strict=True)))


def rows(corpus: Corpus, factor: int = 1) -> list[list[str]]:
    return [[e.user, e.item, str(e.rating), str(e.time * factor)] for e in corpus.events]


def items(corpus: Corpus) -> list[list[str]]:
    return [[item, title] for item, title in corpus.titles.items()]


def delimited(
    lines: list[list[str]], separator: str = ",", quoting: Any = csv.QUOTE_MINIMAL
) -> str:
    target = io.StringIO()
    csv.writer(target, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(lines)
    return target.getvalue()


def pair(folder: Path, suffix: str, content: tuple[bytes, bytes]) -> dict[str, Any]:
    for name, text in zip(("events", "things"), content, strict=True):
        (folder / f"{name}{suffix}").write_bytes(text)
    return {"source": str(folder / f"events{suffix}"), "items": str(folder / f"things{suffix}")}


def separated(
    separator: str, suffix: str, encoding: str = "utf-8", quoting: Any = csv.QUOTE_MINIMAL
) -> Callable[[Corpus, Path], dict[str, Any]]:
    def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
        events = [["userId", "movieId", "rating", "ts"], *rows(corpus)]
        texts = [["movieId", "name"], *items(corpus)]
        tables = (delimited(t, separator, quoting).encode(encoding) for t in (events, texts))
        first, second = tables
        return pair(folder, suffix, (first, second))

    return write


def unit(factor: int) -> Callable[[Corpus, Path], dict[str, Any]]:
    def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
        events = delimited([["uid", "itemId", "stars", "time"], *rows(corpus, factor)])
        texts = delimited([["id", "title"], *items(corpus)])
        return pair(folder, ".csv", (events.encode(), texts.encode()))

    return write


def fractions(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Times from 0 to 1, as RecBole normalises them."""
    lines = [[e.user, e.item, str(e.rating), repr((e.time - START) / 1e5)] for e in corpus.events]
    events = delimited([["user", "item", "score", "timestamp"], *lines])
    texts = delimited([["item", "title"], *items(corpus)])
    return pair(folder, ".csv", (events.encode(), texts.encode()))


def dates(corpus: Corpus, folder: Path) -> dict[str, Any]:
    lines = [
        [e.user, e.item, str(e.rating), datetime.fromtimestamp(e.time, UTC).isoformat()]
        for e in corpus.events
    ]
    events = delimited([["user", "asin", "overall", "date"], *lines], ";")
    texts = delimited([["asin", "title"], *items(corpus)], ";")
    return pair(folder, ".csv", (events.encode(), texts.encode()))


def no_header(corpus: Corpus, folder: Path) -> dict[str, Any]:
    events = "\n".join("::".join(row) for row in rows(corpus))
    texts = "\n".join("::".join(row) for row in items(corpus))
    return pair(folder, ".dat", (events.encode(), texts.encode("latin-1")))


def recbole(corpus: Corpus, folder: Path) -> dict[str, Any]:
    header = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    lines = "\n".join("\t".join(row) for row in [header, *rows(corpus)])
    (folder / "mine.inter").write_text(lines)
    texts = [["item_id:token", "movie_title:token_seq"], *items(corpus)]
    (folder / "mine.item").write_text("\n".join("\t".join(row) for row in texts))
    return {"source": str(folder)}


def movielens(names: tuple[str, str], separator: str, header: bool) -> Any:
    def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
        events = rows(corpus)
        texts = [[item, title, "Drama"] for item, title in items(corpus)]
        if header:
            events.insert(0, ["userId", "movieId", "rating", "timestamp"])
            texts.insert(0, ["movieId", "title", "genres"])
        for name, table in zip(names, (events, texts), strict=True):
            is_csv = separator == ","
            text = delimited(table) if is_csv else "\n".join(map(separator.join, table))
            (folder / name).write_text(text)
        return {"source": str(folder)}

    return write


def movielens_100k(corpus: Corpus, folder: Path) -> dict[str, Any]:
    events = ["\t".join(row) for row in rows(corpus)]
    flags = "|".join("01"[n == 8] for n in range(19))  # Drama
    texts = [f"{item}|{title}|01-Jan-1995||url|{flags}" for item, title in items(corpus)]
    (folder / "u.data").write_text("\n".join(events))
    (folder / "u.item").write_text("\n".join(texts), encoding="latin-1")
    (folder / "u.user").write_text("7|24|F|writer|1\n8|30|M|artist|2\n")
    return {"source": str(folder)}


def movielens_1m(corpus: Corpus, folder: Path) -> dict[str, Any]:
    (folder / "users.dat").write_text("7::F::1::10::48067\n8::M::56::16::70072\n")
    return movielens(("ratings.dat", "movies.dat"), "::", header=False)(corpus, folder)


def movielens_latest(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """The small edition, 25M and 32M: with files that are not read."""
    (folder / "links.csv").write_text("movieId,imdbId,tmdbId\n100,1,2\n")
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n7,100,fun,1\n")
    (folder / "README.txt").write_text("Summary")
    return movielens(("ratings.csv", "movies.csv"), ",", header=True)(corpus, folder)


def mind(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Each event is a click of an impression that shows another item too."""
    moments = (datetime.fromtimestamp(e.time, UTC) for e in corpus.events)
    behaviors = [
        f"{n}\t{e.user}\t{moment:%m/%d/%Y %I:%M:%S %p}\t\t{e.item}-1 {e.item}-0"
        for n, (e, moment) in enumerate(zip(corpus.events, moments, strict=True))
    ]
    news = [f"{item}\tsport\tgolf\t{title}\tabstract\turl\t[]\t[]" for item, title in items(corpus)]
    (folder / "behaviors.tsv").write_text("\n".join(behaviors))
    (folder / "news.tsv").write_text("\n".join(news))
    return {"source": str(folder)}


def goodreads(corpus: Corpus, folder: Path) -> dict[str, Any]:
    moments = (datetime.fromtimestamp(e.time, UTC) for e in corpus.events)
    lines = [
        [e.user, e.item, "True", str(e.rating), f"{moment:%a %b %d %H:%M:%S +0000 %Y}"]
        for e, moment in zip(corpus.events, moments, strict=True)
    ]
    events = delimited([["user_id", "book_id", "is_read", "rating", "date_added"], *lines])
    texts = delimited([["book_id", "title", "authors"], *([*row, "A"] for row in items(corpus))])
    return pair(folder, ".csv", (events.encode(), texts.encode()))


def spoken_dates(day_first: bool) -> Callable[[Corpus, Path], dict[str, Any]]:
    """Dates that begin with the day or the month, as a spreadsheet writes them."""
    form = "%d/%m/%Y %H:%M:%S" if day_first else "%m/%d/%Y %I:%M:%S %p"

    def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
        # Each second of the corpus is an hour, so that days and months differ.
        moments = (
            datetime.fromtimestamp(START + 3600 * (e.time - START), UTC) for e in corpus.events
        )
        lines = [
            [e.user, e.item, str(e.rating), f"{moment:{form}}"]
            for e, moment in zip(corpus.events, moments, strict=True)
        ]
        events = delimited([["user", "asin", "overall", "date"], *lines])
        texts = delimited([["asin", "title"], *items(corpus)])
        return {**pair(folder, ".csv", (events.encode(), texts.encode())), "day_first": day_first}

    return write


def csv_parts(again: bool) -> Callable[[Corpus, Path], dict[str, Any]]:
    """Events in two files, the header in both or in the first one."""

    def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
        header, events = ["userId", "movieId", "rating", "ts"], rows(corpus)
        (folder / "events").mkdir()
        for n, part in enumerate((events[:2], events[2:])):
            lines = [header, *part] if again or n == 0 else part
            (folder / "events" / f"part-{n}.csv").write_text(delimited(lines, ";"))
        (folder / "items.csv").write_text(delimited([["movieId", "name"], *items(corpus)]))
        return {"source": str(folder / "events"), "items": str(folder / "items.csv")}

    return write


def json_parts(corpus: Corpus, folder: Path) -> dict[str, Any]:
    whole = frame(corpus)
    for n, part in enumerate((whole.iloc[:2], whole.iloc[2:])):
        text = part.to_json(orient="records", lines=True)
        (folder / f"part-{n}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return {"source": str(folder)}


def no_layout(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Nothing in the files tells the columns, so the config does."""
    events = "\n".join("^".join(["x^y", *row]) for row in rows(corpus))
    texts = "\n".join("^".join([title, item]) for item, title in items(corpus))
    return {
        **pair(folder, ".txt", (events.encode("utf-16-le"), texts.encode("cp1252"))),
        "columns": {"user": "column_3", "item": "column_4", "rating": "column_5",
                    "timestamp": "column_6", "title": "column_1", "items_item": "column_2"},
        "reading": {"separator": "^", "header": False, "encoding": "utf-16-le",
                    "items": {"separator": "^", "header": False, "encoding": "cp1252"}},
    }  # fmt: skip


def streamed(corpus: Corpus, folder: Path) -> dict[str, Any]:
    path = folder / "rows.parquet"
    frame(corpus).to_parquet(path)
    return {"hub": {"name": "parquet", "files": str(path), "streaming": True}}


def amazon(keys: tuple[str, str, str, str], factor: int, packed: bool) -> Any:
    def write(corpus: Corpus, folder: Path) -> dict[str, Any]:
        user, item, rating, time = keys
        reviews = [
            {user: e.user, item: e.item, rating: e.rating, time: e.time * factor, "title": "Wow"}
            for e in corpus.events
        ]
        if factor == 1:  # the title of a review was called summary then
            reviews = [{**r, "summary": r.pop("title")} for r in reviews]
        metadata = [{item: key, "title": t, "details": {"x": 1}} for key, t in items(corpus)]
        tables = ["\n".join(map(json.dumps, table)).encode() for table in (reviews, metadata)]
        if packed:
            tables = [gzip.compress(table) for table in tables]
        first, second = tables
        return pair(folder, ".jsonl.gz" if packed else ".json", (first, second))

    return write


def frame(corpus: Corpus) -> pd.DataFrame:
    events = pd.DataFrame(corpus.events, columns=["user_id", "item_id", "rating", "timestamp"])
    return events.assign(title=[corpus.titles[item] for item in events["item_id"]])


def in_memory(corpus: Corpus, _: Path) -> dict[str, Any]:
    return data_section(frame(corpus).assign(image=b"\x00"))


def of_datasets(corpus: Corpus, _: Path) -> dict[str, Any]:
    return data_section(datasets.Dataset.from_pandas(frame(corpus)))


def parquet_parts(corpus: Corpus, folder: Path) -> dict[str, Any]:
    whole = frame(corpus).assign(timestamp=pd.to_datetime(frame(corpus)["timestamp"], unit="s"))
    whole.iloc[:2].to_parquet(folder / "part-0.parquet")
    whole.iloc[2:].to_parquet(folder / "part-1.parquet")
    return {"source": str(folder)}


DIALECTS: dict[str, Callable[[Corpus, Path], dict[str, Any]]] = {
    "comma": separated(",", ".csv"),
    "semicolon in .csv": separated(";", ".csv"),
    "tab in .csv": separated("\t", ".csv"),
    "bar in .txt": separated("|", ".txt"),
    "tab": separated("\t", ".tsv"),
    "quoted tab": separated("\t", ".tsv", quoting=csv.QUOTE_ALL),
    "quoted texts after tabs": separated("\t", ".tsv", quoting=csv.QUOTE_NONNUMERIC),
    "quoted comma": separated(",", ".csv", quoting=csv.QUOTE_ALL),
    "mark of UTF-8": separated(",", ".csv", "utf-8-sig"),
    "UTF-16": separated("\t", ".txt", "utf-16"),
    "Latin-1": separated(";", ".csv", "latin-1"),
    "milliseconds": unit(1000),
    "microseconds": unit(10**6),
    "nanoseconds": unit(10**9),
    "fractions": fractions,
    "dates": dates,
    "no header": no_header,
    "RecBole": recbole,
    "MovieLens 100K": movielens_100k,
    "MovieLens 1M": movielens_1m,
    "MovieLens latest": movielens_latest,
    "MovieLens 25M": movielens(("ratings.csv", "movies.csv"), ",", header=True),
    "MovieLens 10M": movielens(("ratings.dat", "movies.dat"), "::", header=False),
    "Amazon 2014": amazon(("reviewerID", "asin", "overall", "unixReviewTime"), 1, packed=False),
    "Amazon 2018": amazon(("reviewerID", "asin", "overall", "unixReviewTime"), 1, packed=True),
    "Amazon 2023": amazon(("user_id", "parent_asin", "rating", "timestamp"), 1000, packed=True),
    "pandas": in_memory,
    "datasets": of_datasets,
    "Parquet parts": parquet_parts,
    "CSV parts": csv_parts(again=True),
    "CSV parts with one header": csv_parts(again=False),
    "JSON parts": json_parts,
    "MIND": mind,
    "Goodreads": goodreads,
    "dates with the day first": spoken_dates(day_first=True),
    "dates with the month first": spoken_dates(day_first=False),
    "no layout": no_layout,
    "stream": streamed,
}


def read(section: dict[str, Any]) -> tuple[dict[str, list[tuple[str, float]]], dict[str, str]]:
    """Users' items and ratings in order of time, and the titles of these items."""
    config = DataConfig.model_validate({"min_interactions": 1, **section})
    tables, columns = read_source(config)
    interactions, _ = build_interactions(validate(tables, columns, 0), config, seed=0)
    ids, titles = interactions.catalogue.item_ids, interactions.catalogue.fields["title"]
    histories = {u: interactions.history_of(at) for at, u in enumerate(interactions.user_ids)}
    found = {
        user: [
            (ids[item], float(rating))
            for item, rating in zip(
                history.items,
                [NO_RATING] * len(history) if history.ratings is None else history.ratings,
                strict=True,
            )
        ]
        for user, history in histories.items()
    }
    met = {item for history in found.values() for item, _ in history}
    return found, {item: title for item, title in zip(ids, titles, strict=True) if item in met}


def expected(
    corpus: Corpus, rated: bool
) -> tuple[dict[str, list[tuple[str, float]]], dict[str, str]]:
    by_user = itertools.groupby(
        sorted(corpus.events, key=lambda e: (e.user, e.time)), lambda e: e.user
    )
    histories = {
        user: [(e.item, e.rating if rated else NO_RATING) for e in events]
        for user, events in by_user
    }
    met = {event.item for event in corpus.events}
    return histories, {item: title for item, title in corpus.titles.items() if item in met}


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=8, deadline=None)
@given(corpus=corpora())
def test_every_dialect_is_read_back_equal(dialect: str, corpus: Corpus) -> None:
    if len({event.item for event in corpus.events}) < 2:
        return  # a catalogue of one item is refused
    with tempfile.TemporaryDirectory() as folder:
        section = DIALECTS[dialect](corpus, Path(folder))
        assert read(section) == expected(corpus, rated=dialect not in UNRATED)
