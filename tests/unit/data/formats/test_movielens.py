"""The editions of MovieLens, each from a few lines in its own format."""

from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.data.formats.movielens import (
    COLUMNS,
    article_first,
    movielens_files,
    read_movielens,
    split_year,
)
from pfm_llm.data.rows import validate


def write(folder: Path, encoding: str = "utf-8", **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", "-").replace("_", ".")).write_bytes(text.encode(encoding))
    return folder


def latest(folder: Path) -> Path:
    return write(
        folder,
        ratings_csv="userId,movieId,rating,timestamp\n1,2,4.5,900\n1,1,3.0,800\n",
        movies_csv="movieId,title,genres\n1,Toy Story (1995),Animation|Children|Comedy\n"
        '2,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",Sci-Fi\n'
        "3,Babylon 5,(no genres listed)\n",
    )


def one_million(folder: Path) -> Path:
    return write(
        folder,
        "latin-1",
        ratings_dat="1::2::4::900\n1::1::3::800\n",
        movies_dat="1::Toy Story (1995)::Animation|Children's|Comedy\n"
        "2::City of Lost Children, The (Cité des enfants perdus, La) (1995)::Sci-Fi\n"
        "3::Babylon 5::\n",
        users_dat="1::F::18::12::48067\n",
    )


def hundred_thousand(folder: Path) -> Path:
    def flags(*genres: int) -> str:
        return "|".join("1" if index in genres else "0" for index in range(19))

    return write(
        folder,
        "latin-1",
        u_data="1\t2\t4\t900\n1\t1\t3\t800\n",
        u_item=f"1|Toy Story (1995)|01-Jan-1995||http://x|{flags(3, 4, 5)}\n"
        "2|City of Lost Children, The (Cité des enfants perdus, La) (1995)|01-Jan-1995||y|"
        f"{flags(15)}\n3|Babylon 5||||{flags(0)}\n",
        u_user="1|24|F|programmer|85711\n",
    )


def recbole(folder: Path) -> Path:
    return write(
        folder,
        ml__100k_inter="user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "1\t2\t4\t900\n1\t1\t3\t800\n",
        ml__100k_item="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        "2\tCity of Lost Children, The (Cité des enfants perdus, La)\t1995\tSci-Fi\n"
        "3\tBabylon 5\tV\tunknown\n4\tunkonwn\tunkonwn\tunknown\n",
        ml__100k_user="user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tF\tprogrammer\t85711\n",
    )


@pytest.mark.parametrize("make", [latest, one_million, hundred_thousand, recbole])
def test_every_edition_reads_to_the_same_titles_years_genres_and_rows(
    make: object, tmp_path: Path
) -> None:
    assert callable(make)
    raw = validate(read_movielens(make(tmp_path)), COLUMNS, max_bad_rows=0)
    fields = raw.catalogue.fields
    assert raw.catalogue.item_ids[:3] == ("1", "2", "3")
    assert fields["title"][:3] == (
        "Toy Story",
        "The City of Lost Children (Cité des enfants perdus, La)",
        "Babylon 5",
    )
    assert fields["year"][:3] == ("1995", "1995", "")
    children = "Children" if make is latest else "Children's"
    assert fields["genres"][:3] == (f"Animation, {children}, Comedy", "Sci-Fi", "")
    assert set(fields) == {"title", "year", "genres"}
    assert list(raw.users) == ["1", "1"]
    assert raw.items.tolist() == [1, 0]
    assert raw.timestamps is not None
    assert raw.ratings is not None
    assert raw.timestamps.tolist() == [900, 800]
    assert raw.ratings.tolist() == [4.5 if make is latest else 4, 3]


@pytest.mark.parametrize(
    ("make", "age"), [(one_million, "18-24"), (hundred_thousand, "24"), (recbole, "24")]
)
def test_users_bring_age_gender_and_occupation_but_no_zip_code(
    make: object, age: str, tmp_path: Path
) -> None:
    assert callable(make)
    raw = validate(read_movielens(make(tmp_path)), COLUMNS, max_bad_rows=0)
    assert {name: values["1"] for name, values in raw.user_fields.items()} == {
        "age": age,
        "gender": "F",
        "occupation": "programmer",
    }


@pytest.mark.parametrize(
    ("make", "users"),
    [(one_million, "users.dat"), (hundred_thousand, "u.user"), (recbole, "ml-100k.user")],
)
def test_the_users_file_may_be_missing(make: object, users: str, tmp_path: Path) -> None:
    assert callable(make)
    folder = make(tmp_path)
    assert folder / users in movielens_files(folder)
    (folder / users).unlink()
    assert len(movielens_files(folder)) == 2
    assert read_movielens(folder).users is None


def test_the_film_without_a_name_is_spelt_right(tmp_path: Path) -> None:
    items = read_movielens(recbole(tmp_path)).items
    assert items is not None
    assert (items.columns["title"][3], items.columns["year"][3]) == ("unknown", "")


def test_a_missing_companion_file_is_named(tmp_path: Path) -> None:
    (latest(tmp_path) / "movies.csv").unlink()
    with pytest.raises(DataError, match=r"holds ratings\.csv but not movies\.csv"):
        movielens_files(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write(latest(tmp_path), ratings_csv="userId,movieId,rating,time\n1,2,4.5,900\n")
    with pytest.raises(DataError, match=r"ratings\.csv has no column 'timestamp'"):
        read_movielens(tmp_path)


def test_another_folder_is_not_movielens(tmp_path: Path) -> None:
    assert movielens_files(tmp_path) == ()
    with pytest.raises(DataError, match=r"holds none of ml-100k\.inter, ratings\.csv"):
        read_movielens(tmp_path)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Godfather, The", "The Godfather"),
        ("Fish Called Wanda, A", "A Fish Called Wanda"),
        ("American in Paris, An", "An American in Paris"),
        ("Postino, Il", "Il Postino"),
        ("Misérables, Les", "Les Misérables"),
        ("Uomo delle stelle, L'", "L'Uomo delle stelle"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Tin Drum, The (Blechtrommel, Die)", "The Tin Drum (Blechtrommel, Die)"),
        ("Shanghai Triad (Yao a yao)", "Shanghai Triad (Yao a yao)"),
        ("Hate (Haine, La)", "Hate (Haine, La)"),
        ("Cook the Thief, His Wife & Her Lover", "Cook the Thief, His Wife & Her Lover"),
        ("I, Worst of All", "I, Worst of All"),
        ("The", "The"),
        (", The", ", The"),
        ("", ""),
    ],
)
def test_a_trailing_article_comes_first(title: str, expected: str) -> None:
    assert article_first(title) == expected


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story (1995)", ("Toy Story", "1995")),
        ("Toy Story (1995) ", ("Toy Story", "1995")),
        ("2001: A Space Odyssey (1968)", ("2001: A Space Odyssey", "1968")),
        ("Land Before Time III (1995) (V)", ("Land Before Time III", "1995")),
        ("Death Note (2006\N{EN DASH}2007)", ("Death Note", "2006")),
        ("Some Series (2006-)", ("Some Series", "2006")),
        ("Seven (Se7en) (1995)", ("Seven (Se7en)", "1995")),
        ("Babylon 5", ("Babylon 5", "")),
        ("Independence Day (ID4)", ("Independence Day (ID4)", "")),
        ("(1995)", ("(1995)", "")),
        ("", ("", "")),
    ],
)
def test_the_year_is_split_from_the_title(title: str, expected: tuple[str, str]) -> None:
    assert split_year(title) == expected
