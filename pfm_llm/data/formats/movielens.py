"""The published editions of the MovieLens data sets."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig
from pfm_llm.data.formats.delimited import CSV, TSV, Layout, read_delimited
from pfm_llm.data.formats.format import Format
from pfm_llm.data.tables import SourceTables, Table

COLUMNS = ColumnsConfig(
    user="user_id", item="item_id", timestamp="timestamp", rating="rating", title="title"
)
"""The columns of the tables that `read_movielens` returns."""

_RATINGS = ("user_id", "item_id", "rating", "timestamp")
_USER_FIELDS = ("user_id", "age", "gender", "occupation")

_HEADER_BYTES = 1000

_YEAR = re.compile(r"\s*\((\d{4})(?:\s*[-\N{EN DASH}]\s*(?:\d{4})?)?\)\s*(?:\(V\))?\s*$")
_ARTICLE = re.compile(
    r"^(?P<main>.+?), (?P<article>The|A|An|Le|La|Les|L'|Un|Une|Der|Die|Das|Ein|Eine|Il|Lo|Gli"
    r"|Una|Uno|El|Los|Las|Det|Den|De|Het)(?P<rest>(?: \(.*\))?)$"
)

# u.item flags its genres by position.
_ML100K_GENRES = (
    *("", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western"),
)
# The codes of ml-1m, from its README.
_ML1M_AGES = {
    **{"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44"},
    **{"45": "45-49", "50": "50-55", "56": "56+"},
}
_ML1M_OCCUPATIONS = {
    **{"0": "other", "1": "academic/educator", "2": "artist", "3": "clerical/admin"},
    **{"4": "college/grad student", "5": "customer service", "6": "doctor/health care"},
    **{"7": "executive/managerial", "8": "farmer", "9": "homemaker", "10": "K-12 student"},
    **{"11": "lawyer", "12": "programmer", "13": "retired", "14": "sales/marketing"},
    **{"15": "scientist", "16": "self-employed", "17": "technician/engineer"},
    **{"18": "tradesman/craftsman", "19": "unemployed", "20": "writer"},
}


@dataclass(frozen=True)
class _Edition:
    """An edition of MovieLens; its first file, and how that begins, tell it from the others."""

    files: tuple[str, ...]
    read: Callable[[Path], SourceTables]
    optional: tuple[str, ...] = ()
    names: tuple[bytes, ...] = ()


def movielens_files(folder: Path) -> tuple[Path, ...]:
    """The files that `read_movielens` reads; empty when ``folder`` is not MovieLens.

    Raises:
        DataError: Some of the files that belong together are missing.
    """
    edition = _edition(folder)
    if edition is None:
        return ()
    missing = [name for name in edition.files if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} holds {edition.files[0]} but not {', '.join(missing)}; unpack the whole "
            "MovieLens archive there"
        )
    names = (*edition.files, *edition.optional)
    return tuple(folder / name for name in names if (folder / name).is_file())


def read_movielens(folder: Path) -> SourceTables:
    """Read a MovieLens folder of any edition; its files tell the edition.

    The editions are ml-latest-small and its larger siblings up to ml-32m (``ratings.csv``,
    ``movies.csv``), ml-1m and ml-10m (``ratings.dat``, ``movies.dat``, and for ml-1m
    ``users.dat``), ml-100k (``u.data``, ``u.item``, ``u.user``) and its RecBole form
    (``ml-100k.inter``, ``.item``, ``.user``). Zip codes are not read.

    Returns:
        Tables with the columns of `COLUMNS`; items also have ``year`` (four digits or ``""``)
        and ``genres`` (joined by commas), users ``age``, ``gender`` and ``occupation``.

    Raises:
        DataError: The folder is not MovieLens, or a file of it cannot be read.
    """
    edition = _edition(folder)
    if edition is None or not movielens_files(folder):
        raise DataError(f"{folder} holds none of {', '.join(e.files[0] for e in _EDITIONS)}")
    return edition.read(folder)


def article_first(title: str) -> str:
    """Move a trailing article to the front: ``"Godfather, The"`` is ``"The Godfather"``.

    A parenthesis at the end, mostly the original title, stays as it is.
    """
    match = _ARTICLE.match(title)
    if match is None:
        return title
    article = match["article"]
    blank = "" if article.endswith("'") else " "
    return f"{article}{blank}{match['main']}{match['rest']}"


def split_year(title: str) -> tuple[str, str]:
    """``"Toy Story (1995)"`` as title and year; the year is ``""`` where there is none."""
    match = _YEAR.search(title)
    if match is None or not title[: match.start()].strip():
        return title.strip(), ""
    return title[: match.start()].strip(), match[1]


def _edition(folder: Path) -> _Edition | None:
    return next((e for e in _EDITIONS if _is_of(folder / e.files[0], e.names)), None)


def _is_of(path: Path, names: tuple[bytes, ...]) -> bool:
    """Whether a file is there and names these columns; other sources have a ratings.csv too."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.readline(_HEADER_BYTES)
    return all(name in header for name in names)


def _read_latest(folder: Path) -> SourceTables:
    ratings = read_delimited(folder / "ratings.csv", CSV)
    movies = read_delimited(folder / "movies.csv", CSV)
    return SourceTables(
        _pick(ratings, "rating", "timestamp", user_id="userId", item_id="movieId"),
        _spoken(_pick(movies, "title", "genres", item_id="movieId")),
    )


def _read_1m(folder: Path) -> SourceTables:
    def read(name: str, *header: str) -> Table:
        return read_delimited(folder / name, Layout("::", header))

    users = None
    if (folder / "users.dat").is_file():
        users = read("users.dat", "user_id", "gender", "age", "occupation", "zip_code")
        decoded = {
            "age": [_ML1M_AGES.get(age, "") for age in users.columns["age"]],
            "occupation": [_ML1M_OCCUPATIONS.get(job, "") for job in users.columns["occupation"]],
        }
        users = _pick(replace(users, columns={**users.columns, **decoded}), *_USER_FIELDS)
    return SourceTables(
        read("ratings.dat", *_RATINGS),
        _spoken(read("movies.dat", "item_id", "title", "genres")),
        users,
    )


def _read_100k(folder: Path) -> SourceTables:
    flags = [f"genre {index}" for index in range(len(_ML100K_GENRES))]
    header = ("item_id", "title", "release_date", "video_date", "url", *flags)
    movies = read_delimited(folder / "u.item", Layout("|", header))
    flagged = zip(*(movies.columns[flag] for flag in flags), strict=True)
    genres = [
        "|".join(name for name, flag in zip(_ML100K_GENRES, row, strict=True) if flag == "1")
        for row in flagged
    ]
    movies = replace(movies, columns={**movies.columns, "genres": genres})
    users = None
    if (folder / "u.user").is_file():
        header = (*_USER_FIELDS, "zip_code")
        users = _pick(read_delimited(folder / "u.user", Layout("|", header)), *_USER_FIELDS)
    return SourceTables(
        read_delimited(folder / "u.data", Layout("\t", _RATINGS)),
        _spoken(movies),
        users,
    )


def _read_recbole(folder: Path) -> SourceTables:
    def read(suffix: str, *names: str, **renamed: str) -> Table:
        return _pick(read_delimited(folder / f"ml-100k.{suffix}", TSV), *names, **renamed)

    items = read("item", "item_id", title="movie_title", year="release_year", genres="class")
    titles, years = items.columns["title"], items.columns["year"]
    columns = {
        **items.columns,
        # The file itself misspells the one film without a name.
        "title": [article_first("unknown" if text == "unkonwn" else text) for text in titles],
        "year": [year if re.fullmatch(r"\d{4}", year) else "" for year in years],
        "genres": [_genres(text, " ") for text in items.columns["genres"]],
    }
    has_users = (folder / "ml-100k.user").is_file()
    return SourceTables(
        read("inter", *_RATINGS),
        replace(items, columns=columns),
        read("user", *_USER_FIELDS) if has_users else None,
    )


def _spoken(movies: Table) -> Table:
    """Titles with the article first; the year and the genres in columns of their own."""
    split = [split_year(title) for title in movies.columns["title"]]
    columns = {
        "item_id": movies.columns["item_id"],
        "title": [article_first(title) for title, _ in split],
        "year": [year for _, year in split],
        "genres": [_genres(text, "|") for text in movies.columns["genres"]],
    }
    return replace(movies, header=tuple(columns), columns=columns)


def _genres(text: str, separator: str) -> str:
    if text in ("(no genres listed)", "unknown"):
        return ""
    return ", ".join(genre for genre in text.split(separator) if genre)


def _pick(table: Table, *names: str, **renamed: str) -> Table:
    """The columns ``names``, and those of ``renamed`` under their new names; each must be there."""
    olds = {name: name for name in names} | renamed
    columns = {new: table.column(old) for new, old in olds.items()}
    return replace(table, header=tuple(columns), columns=columns)


_EDITIONS = (
    _Edition(("ml-100k.inter", "ml-100k.item"), _read_recbole, ("ml-100k.user",)),
    _Edition(("ratings.csv", "movies.csv"), _read_latest, names=(b"movieId",)),
    _Edition(("ratings.dat", "movies.dat"), _read_1m, ("users.dat",)),
    _Edition(("u.data", "u.item"), _read_100k, ("u.user",)),
)

FORMAT = Format("MovieLens", movielens_files, read_movielens, COLUMNS)
