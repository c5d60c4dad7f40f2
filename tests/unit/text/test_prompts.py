"""Tests of pfm_llm.text.prompts and of the shipped prompts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text import prompts
from pfm_llm.text.prompts import Prompt, load_prompt

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
ALL_SHIPPED = sorted(path.stem for path in (ROOT / "prompts").glob("*.toml"))
SHIPPED = [key for key in ALL_SHIPPED if not key.startswith("would_like")]
FILMS: list[tuple[Mapping[str, str], float | None]] = [
    ({"title": "Brazil", "year": "1985", "genres": "Sci-Fi", "details": "1985, Sci-Fi"}, 5.0),
    ({"title": "Ran", "year": "", "genres": "", "details": ""}, 3.5),
    (
        {
            "title": "Big, [the] {film}",
            "year": "1988",
            "genres": "Comedy, Drama",
            "details": "1988, Comedy, Drama",
        },
        None,
    ),
]
GOOD: dict[str, object] = {
    "name": "mine",
    "version": 2,
    "description": "For tests.",
    "header": "Seen:\n",
    "item": "{title}[ ({year})]\n",
    "catalogue_item": "{title}",
    "fields": ["title", "year"],
}


def prompt(item: str, catalogue_item: str = "{title}", header: str = "") -> Prompt:
    return Prompt("mine", 1, header, item, catalogue_item, ("title", "year"))


def write(folder: Path, stem: str = "mine.v2", **changes: object) -> str:
    """A prompt file like GOOD with these keys changed, or left out where None."""
    tree = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    # A Python string in repr with double quotes, a list and an int are TOML as they stand.
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items()]
    path = folder / f"{stem}.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def _toml(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower()


# --- shipped prompts


@pytest.mark.parametrize("key", SHIPPED)
def test_shipped_prompt_is_never_edited(key: str) -> None:
    """Rendered text and hash equal the golden file. A changed prompt is a new version."""
    shipped = load_prompt(key)
    history = shipped.header + "".join(shipped.render_item(*film) for film in FILMS)
    catalogue = "".join(f"{shipped.render_catalogue_item(fields)!r}\n" for fields, _ in FILMS)
    rendered = f"{shipped.content_hash()}\n--- history\n{history}--- catalogue\n{catalogue}"
    assert rendered == (GOLDEN / f"{key}.txt").read_text(encoding="utf-8")


def test_every_golden_prompt_is_shipped() -> None:
    """Neither a shipped prompt without a golden file, nor a used prompt that disappeared."""
    assert sorted(path.stem for path in GOLDEN.glob("*.v[0-9]*.txt")) == ALL_SHIPPED
    assert {"next_item.v1", "next_item_genres.v1", "next_item_ratings.v1"} <= set(SHIPPED)


def test_default_prompt_is_title_only() -> None:
    default = load_prompt("next_item.v1")
    assert default.fields == ("title",)
    assert not default.uses_rating
    assert default.render_item({"title": "Oat milk 1L"}, 4.0) == "Oat milk 1L\n"


def test_only_the_ratings_prompt_uses_ratings() -> None:
    assert [key for key in SHIPPED if load_prompt(key).uses_rating] == ["next_item_ratings.v1"]


def test_unknown_name_lists_the_shipped() -> None:
    with pytest.raises(
        ConfigError, match=r"'next_itm\.v1'.*next_item\.v1, next_item\.v2, next_item_genres\.v1"
    ):
        load_prompt("next_itm.v1")


def test_name_cannot_leave_the_folder() -> None:
    with pytest.raises(ConfigError, match="unknown prompt"):
        load_prompt("../prompts/next_item.v1")


def test_wheels_prompts_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, the prompts lie in pfm_llm/_prompts; in a checkout beside the package."""
    package = tmp_path / "pfm_llm"
    (tmp_path / "prompts").mkdir()
    package.mkdir()
    monkeypatch.setattr(prompts, "__file__", str(package / "text" / "prompts.py"))
    write(tmp_path / "prompts", header="checkout")
    assert load_prompt("mine.v2").header == "checkout"
    (package / "_prompts").mkdir()
    write(package / "_prompts", header="wheel")
    assert load_prompt("mine.v2").header == "wheel"


# --- files


def test_file_is_read_as_it_stands(tmp_path: Path) -> None:
    loaded = load_prompt(write(tmp_path))
    assert loaded == Prompt(
        name="mine",
        version=2,
        header="Seen:\n",
        item="{title}[ ({year})]\n",
        catalogue_item="{title}",
        fields=("title", "year"),
    )
    assert loaded.key == "mine.v2"


@pytest.mark.parametrize("key", list(GOOD))
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.v2\.toml:\s+{key}: Field required"):
        load_prompt(write(tmp_path, **{key: None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itm": "x"}, "unknown key itm; did you mean item"),
        ({"zzz": "x"}, "unknown key zzz; valid here: name, version"),
        ({"version": "2"}, "version: Input should be a valid integer"),
        ({"version": True}, "version: Input should be a valid integer"),
        ({"version": 0}, "version: Input should be greater than or equal to 1"),
        ({"name": "my prompt"}, r"name: String should match pattern '\^\[a-z0-9_\]"),
        ({"header": 1}, "header: Input should be a valid string"),
        ({"header": "{title}"}, "header: is plain text"),
        ({"fields": "title"}, "fields: Input should be a valid list"),
        ({"fields": [1]}, r"fields\.0: Input should be a valid string"),
        ({"fields": ["a b"]}, "fields: 'a b' is no field name"),
        ({"fields": []}, "fields: empty"),
        ({"fields": ["title", "title"]}, "fields: 'title' is listed twice"),
        ({"fields": ["title", "year", "rating"]}, "fields: 'rating' is a field of the interaction"),
        ({"fields": ["title"]}, r"item: placeholder \{year\} is not in fields"),
        ({"fields": ["title", "year", "genres"]}, "fields: 'genres' is not used"),
        ({"catalogue_item": "{title} {genres}"}, r"catalogue_item: placeholder \{genres\}"),
        ({"catalogue_item": "{title} {rating}"}, r"catalogue_item: placeholder \{rating\}"),
        ({"catalogue_item": "film"}, "catalogue_item: has no item field"),
        ({"item": "{rating}\n"}, "item: has no item field"),
        ({"item": ""}, "item: has no item field"),
        ({"item": "{title}[ {year}"}, r"item: unmatched '\['"),
        ({"item": "{title}] {year}"}, r"item: unmatched '\]'"),
        ({"item": "{title}[ a [{year}]]"}, r"item: unmatched '\['"),
        ({"item": "{title} {year"}, r"item: unmatched '\{'"),
        ({"item": "{title} {} {year}"}, r"item: unmatched '\{'"),
        ({"item": "{title}} {year}"}, r"item: unmatched '\}'"),
        ({"item": "{title}[ film] {year}"}, "item: an optional part"),
    ],
)
def test_wrong_file_names_file_key_and_remedy(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.v2\.toml:\s+{message}"):
        load_prompt(write(tmp_path, **changes))


def test_file_must_be_called_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"call the file mine\.v2\.toml"):
        load_prompt(write(tmp_path, stem="mine.v1"))


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read prompt"):
        load_prompt(str(tmp_path / "none.v1.toml"))


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_broken_toml_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.v1.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_prompt(str(path))


# --- rendering


@pytest.mark.parametrize(
    ("template", "expected_known", "expected_unknown"),
    [
        ("{title} ({year})", "Ran (1985)", "Ran ()"),
        ("{title}[ ({year})]", "Ran (1985)", "Ran"),
        ("{title}[ ({year}, {title})]", "Ran (1985, Ran)", "Ran"),
        ("[{year}: ]{title}", "1985: Ran", "Ran"),
        ("{title}[[{year}]]", "Ran[1985]", "Ran[]"),
        ("{title}[ [[{year}]] ]", "Ran [1985] ", "Ran"),
        ("{{{title}}} {year}", "{Ran} 1985", "{Ran} "),
        ("{title}[ {year}][ {year}]", "Ran 1985 1985", "Ran"),
    ],
)
def test_optional_parts_and_doubled_characters(
    template: str, expected_known: str, expected_unknown: str
) -> None:
    made = prompt(template)
    assert made.render_item({"title": "Ran", "year": "1985"}, None) == expected_known
    assert made.render_item({"title": "Ran", "year": ""}, None) == expected_unknown


@pytest.mark.parametrize(
    ("rating", "expected"),
    [(5.0, "Ran: 5"), (3.5, "Ran: 3.5"), (0.0, "Ran: 0"), (None, "Ran"), (float("nan"), "Ran")],
)
def test_ratings_are_short_and_optional(rating: float | None, expected: str) -> None:
    """A rating of 0 is a rating; an unknown one leaves its part out."""
    assert prompt("{title}[: {rating}]").render_item({"title": "Ran"}, rating) == expected


def test_rating_from_float32_has_no_tail() -> None:
    """float32 3.7 is 3.7000000477 as a Python float."""
    rating = float(np.float32(3.7))
    assert prompt("{title} {rating}").render_item({"title": "Ran"}, rating) == "Ran 3.7"


@given(title=st.text(min_size=1).filter(str.strip), year=st.text())
def test_field_text_is_never_read_as_template(title: str, year: str) -> None:
    """Brackets and braces in a title stay as they are."""
    made = prompt("{title}[ ({year})]\n")
    expected = f"{title} ({year})\n" if year else f"{title}\n"
    assert made.render_item({"title": title, "year": year}, None) == expected


@pytest.mark.parametrize("title", ["", "  "])
def test_item_without_text_is_an_error(title: str) -> None:
    """There would be no token to read a state from."""
    made = prompt("{title}[ ({year})]\n")
    with pytest.raises(DataError, match=r"mine\.v1 renders an item with no text"):
        made.render_item({"title": title, "year": ""}, None)
    with pytest.raises(DataError, match="no text"):
        made.render_catalogue_item({"title": title, "year": ""})


def test_hash_covers_all_that_is_rendered() -> None:
    base = prompt("{title}\n")
    variants = [
        base,
        replace(base, name="other"),
        replace(base, version=2),
        replace(base, header="H"),
        replace(base, item="{title}"),
        replace(base, catalogue_item="{title}\n"),
        replace(base, fields=("title",)),
    ]
    assert len({variant.content_hash() for variant in variants}) == len(variants)
    assert base.content_hash() == prompt("{title}\n").content_hash()


def catalogue(*fields: str) -> Catalogue:
    return Catalogue(("a",), dict.fromkeys(fields, ("text",)))


def test_missing_item_field_is_named() -> None:
    made = prompt("{title}[ {year}]")
    made.check_fields(catalogue("title", "year", "genres"))
    with pytest.raises(DataError, match="'year'; the catalogue has title, genres"):
        made.check_fields(catalogue("title", "genres"))
