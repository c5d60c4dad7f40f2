r"""Prompt templates: how an item and a history become text.

A prompt is a TOML file named ``<name>.v<version>.toml``. Once used it is never edited: a change
is a new version, so that a prompt's key always stands for the same text.

    name = "next_item_genres"
    version = 1
    description = "Title, year and genres."
    header = "History:\n"                               # plain text before a window's first item
    item = "{title}[ ({year})][, {genres}]\n"           # one item of a history
    catalogue_item = "{title}[ ({year})][, {genres}]\n" # an item by itself, for the catalogue
    fields = ["title", "year", "genres"]                # exactly the item fields used

In ``item`` and ``catalogue_item``:

- ``{field}`` is an item's field, the empty string where it is unknown. ``{rating}`` (in ``item``
  only, and not in ``fields``) is the user's rating: a field of the interaction, not of the item.
- ``{details}`` (not in ``fields``) is whatever else describes the item, such as year, genres,
  category or brand, joined by commas: any data have their own; see `text.details`.
- ``[...]`` is an optional part, left out when any placeholder in it is empty, so that unknown
  fields leave no litter such as ``()``. Parts do not nest.
- A literal bracket or brace is doubled: ``[[``, ``]]``, ``{{``, ``}}``.

Items are tokenised one by one and their tokens are concatenated, so the last token of an item is
always the end of its text. The user's state is read there. A control token of the model, such as
``<|im_start|>``, works in the header alone: in the text of an item it is letters.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.model import PositiveCount, Settings
from pfm_llm.config.text import validated
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.details import details

RATING = "rating"
DETAILS = "details"
MAX_PROMPT_BYTES = 1 << 16
"""Size limit of a prompt file: a prompt is read by people."""

_TOKEN = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{(?P<field>\w+)\}|[\[\]{}]|[^\[\]{}]+")


class _PromptFile(Settings):
    """The keys of a prompt file."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern="^[a-z0-9_]+$")]
    version: PositiveCount
    description: str
    header: str
    item: str
    catalogue_item: str
    fields: list[str]


@dataclass(frozen=True)
class Prompt:
    """One version of one template, checked.

    Attributes:
        name: The template's name, such as ``next_item``.
        version: From 1.
        header: Plain text before a window's first item; may be empty.
        item: Template of one item of a history.
        catalogue_item: Template of an item by itself.
        fields: The item fields that the templates use.
        toml: The file's text, to pass the prompt on.
    """

    name: str
    version: int
    header: str
    item: str
    catalogue_item: str
    fields: tuple[str, ...]
    toml: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def key(self) -> str:
        """``<name>.v<version>``: the file's name without ``.toml``."""
        return f"{self.name}.v{self.version}"

    @property
    def uses_rating(self) -> bool:
        """Whether an item of a history shows the user's rating."""
        return RATING in _placeholders(self.item)

    @property
    def uses_details(self) -> bool:
        """Whether an item shows whatever else describes it."""
        return DETAILS in _placeholders(self.item) | _placeholders(self.catalogue_item)

    def content_hash(self) -> str:
        """SHA-256, in hex, over everything that the rendered text depends on."""
        parts = [self.key, self.header, self.item, self.catalogue_item, *self.fields]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_fields(self, catalogue: Catalogue) -> None:
        """Make sure that a catalogue has the fields of this prompt.

        Raises:
            DataError: A field is missing; the message names it and the available fields.
        """
        for field in self.fields:
            if field not in catalogue.fields:
                raise DataError(
                    f"prompt {self.key} needs the item field {field!r}; the catalogue has "
                    f"{', '.join(catalogue.fields)}: add a column of that name to the items, or "
                    "choose another prompt"
                )

    def fields_of(self, catalogue: Catalogue) -> list[dict[str, str]]:
        """The fields of every item that the templates use, for `render_item`.

        Raises:
            DataError: A field is missing; see `check_fields`.
        """
        self.check_fields(catalogue)
        columns = {name: catalogue.fields[name] for name in self.fields}
        if self.uses_details:
            columns[DETAILS] = tuple(details(catalogue))
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def render_item(self, fields: Mapping[str, str], rating: float | None) -> str:
        """The text of one item of a history.

        Args:
            fields: The item's fields, from `fields_of`.
            rating: The user's rating; None or NaN if unknown. It is rendered as ``5`` or ``3.5``,
                and prompts without ``{rating}`` ignore it.

        Raises:
            DataError: The text is empty, so there would be no token to read a state from.
        """
        known = rating is not None and not math.isnan(rating)
        return self._render(self.item, {**fields, RATING: f"{rating:g}" if known else ""})

    def render_catalogue_item(self, fields: Mapping[str, str]) -> str:
        """The text of an item by itself; see `render_item`."""
        return self._render(self.catalogue_item, fields)

    def catalogue_texts(self, catalogue: Catalogue) -> list[str]:
        """The text of every item by itself, in the order of the catalogue.

        Raises:
            DataError: A field is missing, an item has no text, or several items all have the same.
        """
        texts = []
        for item_id, fields in zip(catalogue.item_ids, self.fields_of(catalogue), strict=True):
            try:
                texts.append(self.render_catalogue_item(fields))
            except DataError as error:
                raise DataError(f"item {item_id!r}: {error}") from error
        if len(texts) > 1 and len(set(texts)) == 1:
            raise DataError(
                f"all {len(texts):,} items have one text, {texts[0].strip()[:60]!r}, so no text "
                "tells them apart; name the column of their titles (data.columns.title) or of "
                "further texts (data.columns.text), or choose a prompt that shows more of them"
            )
        return texts

    def _render(self, template: str, values: Mapping[str, str]) -> str:
        text = "".join(part.render(values) for part in _parse(template))
        if not text.strip():
            raise DataError(
                f"prompt {self.key} renders an item with no text ({dict(values)}); give the item "
                "a title, or choose a prompt whose fields it has"
            )
        return text


def load_prompt(name_or_path: str) -> Prompt:
    """Read and check a prompt.

    Args:
        name_or_path: The key of a shipped prompt, such as ``next_item.v1``, or the path of a
            TOML file (it ends in ``.toml``).

    Raises:
        ConfigError: There is no such prompt (the message lists the shipped ones), or the file
            breaks the format (the message names the file and the key).
    """
    if name_or_path.endswith(".toml"):
        return _read_prompt(Path(name_or_path))
    shipped = {path.stem: path for path in _prompt_dir().glob("*.toml")}
    if name_or_path not in shipped:
        raise ConfigError(
            f"prompt: unknown prompt {name_or_path!r}; there are {', '.join(sorted(shipped))}; "
            "or give the path of a .toml file"
        )
    return _read_prompt(shipped[name_or_path])


def _prompt_dir() -> Path:
    package = Path(__file__).parents[1]
    # The build copies the prompts into the wheel; a checkout has them beside the package.
    packaged = package / "_prompts"
    return packaged if packaged.is_dir() else package.parent / "prompts"


def _read_prompt(path: Path) -> Prompt:
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_PROMPT_BYTES:,} bytes; no prompt is")
        text = content.decode()
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read prompt {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, no TOML, or brackets without end
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    file = validated(tree, _PromptFile, str(path))
    values = file.model_dump(exclude={"description", "fields"})
    prompt = Prompt(**values, fields=tuple(file.fields), toml=text)
    try:
        _check_plain(file)
        _check_templates(prompt)
        if prompt.key != path.stem:
            raise ConfigError(
                f"name, version: they make {prompt.key!r}; call the file {prompt.key}.toml, or "
                "correct them (a changed prompt is a new version)"
            )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return prompt


def _check_plain(file: _PromptFile) -> None:
    """Check the texts that are no templates: the header and the names of the fields."""
    if "{" in file.header or "}" in file.header:
        raise ConfigError("header: is plain text and has no placeholders; remove the braces")
    for field in file.fields:
        if not re.fullmatch(r"\w+", field):
            raise ConfigError(f"fields: {field!r} is no field name; use letters, digits and _")
        if file.fields.count(field) > 1:
            raise ConfigError(f"fields: {field!r} is listed twice; remove one of them")
    if RATING in file.fields:
        raise ConfigError(
            f"fields: {RATING!r} is a field of the interaction; leave it out of fields"
        )
    if DETAILS in file.fields:
        raise ConfigError(f"fields: {DETAILS!r} stands for other fields; leave it out of fields")
    if not file.fields:
        raise ConfigError("fields: empty; an item needs at least one field as its text")


def _check_templates(prompt: Prompt) -> None:
    allowed = {
        "item": {*prompt.fields, RATING, DETAILS},
        "catalogue_item": {*prompt.fields, DETAILS},
    }
    used: set[str] = set()
    for key, names in allowed.items():
        try:
            placeholders = _placeholders(getattr(prompt, key))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
        if unknown := sorted(placeholders - names):
            raise ConfigError(f"{key}: placeholder {{{unknown[0]}}} is not in fields; add it")
        if not placeholders - {RATING, DETAILS}:
            raise ConfigError(f"{key}: has no item field, so all items would read alike; add one")
        used |= placeholders
    for field in prompt.fields:
        if field not in used:
            raise ConfigError(f"fields: {field!r} is not used in any template; remove it")


@dataclass(frozen=True)
class _Part:
    """A stretch of a template: pieces of (literal text, False) or (field name, True)."""

    pieces: tuple[tuple[str, bool], ...]
    optional: bool

    def render(self, values: Mapping[str, str]) -> str:
        """The text, or nothing for an optional part with an empty placeholder."""
        if self.optional and not all(values[name] for name, is_field in self.pieces if is_field):
            return ""
        return "".join(values[text] if is_field else text for text, is_field in self.pieces)


def _placeholders(template: str) -> set[str]:
    return {text for part in _parse(template) for text, is_field in part.pieces if is_field}


@functools.lru_cache(maxsize=64)
def _parse(template: str) -> list[_Part]:
    parts: list[_Part] = []
    pieces: list[tuple[str, bool]] = []
    inside = False
    for match in _TOKEN.finditer(template):
        token = match[0]
        if match["field"]:
            pieces.append((match["field"], True))
        elif token in {"[", "]"}:
            if inside is (token == "["):
                raise ConfigError(f"unmatched {token!r}; double it to mean the character")
            if inside and not any(is_field for _, is_field in pieces):
                raise ConfigError("an optional part [...] has no placeholder; [[ means a bracket")
            parts.append(_Part(tuple(pieces), optional=inside))
            pieces, inside = [], not inside
        elif token in {"{", "}"}:
            raise ConfigError(f"unmatched {token!r}; double it to mean the character")
        else:
            is_doubled = token in {"[[", "]]", "{{", "}}"}
            pieces.append((token[0] if is_doubled else token, False))
    if inside:
        raise ConfigError("unmatched '['; double it to mean the character")
    return [*parts, _Part(tuple(pieces), optional=False)]
