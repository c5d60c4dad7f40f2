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
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.model import PositiveCount, Settings
from pfm_llm.config.text import validated
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.details import details
from pfm_llm.text.templates import placeholders, render

RATING = "rating"
DETAILS = "details"
MAX_PROMPT_BYTES = 1 << 16
"""Size limit of a prompt file: a prompt is read by people."""


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
        return RATING in placeholders(self.item)

    @property
    def uses_details(self) -> bool:
        """Whether an item shows whatever else describes it."""
        return DETAILS in placeholders(self.item) | placeholders(self.catalogue_item)

    def content_hash(self) -> str:
        """SHA-256, in hex, over everything that the rendered text depends on."""
        parts = [self.key, self.header, self.item, self.catalogue_item, *self.fields]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_fields(self, catalogue: Catalogue) -> None:
        """Make sure that a catalogue has the fields of this prompt.

        Raises:
            DataError: A field is missing; the message names it and the available fields.
        """
        _check_catalogue(self.key, self.fields, catalogue)

    def fields_of(self, catalogue: Catalogue) -> list[dict[str, str]]:
        """The fields of every item that the templates use, for `render_item`.

        Raises:
            DataError: A field is missing; see `check_fields`.
        """
        return item_fields(self.key, self.fields, self.uses_details, catalogue)

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
        values = {**fields, RATING: f"{rating:g}" if known else ""}
        return render_text(self.key, self.item, values)

    def render_catalogue_item(self, fields: Mapping[str, str]) -> str:
        """The text of an item by itself; see `render_item`."""
        return render_text(self.key, self.catalogue_item, fields)

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


def render_text(key: str, template: str, values: Mapping[str, str]) -> str:
    """The text of an item by a template of a prompt.

    Args:
        key: The prompt's key, for the message.
        template: The template.
        values: The value of each placeholder.

    Raises:
        DataError: The text is empty.
    """
    text = render(template, values)
    if not text.strip():
        raise DataError(
            f"prompt {key} renders an item with no text ({dict(values)}); give the item a title, "
            "or choose a prompt whose fields it has"
        )
    return text


def item_fields(
    key: str, fields: Sequence[str], uses_details: bool, catalogue: Catalogue
) -> list[dict[str, str]]:
    """The fields of every item that the templates of a prompt use.

    Args:
        key: The prompt's key, for the message.
        fields: The item fields of the prompt.
        uses_details: Whether it shows `DETAILS` too.
        catalogue: The items.

    Raises:
        DataError: A field is missing; the message names it and the available fields.
    """
    _check_catalogue(key, fields, catalogue)
    columns = {name: catalogue.fields[name] for name in fields}
    if uses_details:
        columns[DETAILS] = tuple(details(catalogue))
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def load_prompt(name_or_path: str) -> Prompt:
    """Read and check a prompt.

    Args:
        name_or_path: The key of a shipped prompt, such as ``next_item.v1``, or the path of a
            TOML file (it ends in ``.toml``).

    Raises:
        ConfigError: There is no such prompt (the message lists the shipped ones), or the file
            breaks the format (the message names the file and the key).
    """
    path = find_prompt(name_or_path, "catalogue_item")
    tree, text = read_prompt_file(path)
    file = validated(tree, _PromptFile, str(path))
    values = file.model_dump(exclude={"description", "fields"})
    prompt = Prompt(**values, fields=tuple(file.fields), toml=text)
    try:
        check_plain(file.header, "header")
        check_fields(file.fields)
        check_templates(
            {"item": file.item, "catalogue_item": file.catalogue_item},
            file.fields,
            {"item": {RATING, DETAILS}, "catalogue_item": {DETAILS}},
        )
        check_name(prompt.key, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return prompt


def find_prompt(name_or_path: str, template: str) -> Path:
    """The file of a prompt.

    Args:
        name_or_path: As in `load_prompt`.
        template: A key that every prompt of the wanted kind has.

    Raises:
        ConfigError: No prompt of that kind is shipped under the name.
    """
    if name_or_path.endswith(".toml"):
        return Path(name_or_path)
    shipped = {path.stem: path for path in sorted(_prompt_dir().glob("*.toml"))}

    def is_wanted(path: Path) -> bool:
        return template in read_prompt_file(path)[0]

    found = shipped.get(name_or_path)
    if found is None or not is_wanted(found):
        names = ", ".join(name for name, path in shipped.items() if is_wanted(path))
        raise ConfigError(
            f"prompt: unknown prompt {name_or_path!r}; there are {names}; "
            "or give the path of a .toml file"
        )
    return found


def read_prompt_file(path: Path) -> tuple[dict[str, Any], str]:
    """The keys and the text of a prompt file.

    Raises:
        ConfigError: It cannot be read, is too large, or is no TOML.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_PROMPT_BYTES:,} bytes; no prompt is")
        text = content.decode()
        return tomllib.loads(text), text
    except OSError as error:
        raise ConfigError(f"cannot read prompt {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, no TOML, or brackets without end
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def check_name(key: str, path: Path) -> None:
    """Check that a prompt's file has its name.

    Raises:
        ConfigError: It has another one.
    """
    if key != path.stem:
        raise ConfigError(
            f"name, version: they make {key!r}; call the file {key}.toml, or "
            "correct them (a changed prompt is a new version)"
        )


def _prompt_dir() -> Path:
    package = Path(__file__).parents[1]
    # The build copies the prompts into the wheel; a checkout has them beside the package.
    packaged = package / "_prompts"
    return packaged if packaged.is_dir() else package.parent / "prompts"


def check_plain(text: str, key: str) -> None:
    """Check a text that is no template.

    Raises:
        ConfigError: It has braces.
    """
    if "{" in text or "}" in text:
        raise ConfigError(f"{key}: is plain text and has no placeholders; remove the braces")


def check_fields(fields: Sequence[str]) -> None:
    """Check the names of the item fields of a prompt.

    Raises:
        ConfigError: A name is wrong, reserved or repeated, or there is none.
    """
    for field in fields:
        if not re.fullmatch(r"\w+", field):
            raise ConfigError(f"fields: {field!r} is no field name; use letters, digits and _")
        if fields.count(field) > 1:
            raise ConfigError(f"fields: {field!r} is listed twice; remove one of them")
    if RATING in fields:
        raise ConfigError(
            f"fields: {RATING!r} is a field of the interaction; leave it out of fields"
        )
    if DETAILS in fields:
        raise ConfigError(f"fields: {DETAILS!r} stands for other fields; leave it out of fields")
    if not fields:
        raise ConfigError("fields: empty; an item needs at least one field as its text")


def _check_catalogue(key: str, fields: Sequence[str], catalogue: Catalogue) -> None:
    for field in fields:
        if field not in catalogue.fields:
            raise DataError(
                f"prompt {key} needs the item field {field!r}; the catalogue has "
                f"{', '.join(catalogue.fields)}: add a column of that name to the items, or "
                "choose another prompt"
            )


def check_templates(
    templates: Mapping[str, str], fields: Sequence[str], beside: Mapping[str, Set[str]]
) -> None:
    """Check the templates of a prompt.

    Args:
        templates: By key.
        fields: The item fields of the prompt.
        beside: By key the placeholders that a template may have besides them.

    Raises:
        ConfigError: A template is malformed, has an unknown placeholder or no item field, or a
            field is in no template.
    """
    used: set[str] = set()
    for key, template in templates.items():
        try:
            found = placeholders(template)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
        if unknown := sorted(found - {*fields, *beside[key]}):
            raise ConfigError(f"{key}: placeholder {{{unknown[0]}}} is not in fields; add it")
        if not found - {RATING, DETAILS}:
            raise ConfigError(f"{key}: has no item field, so all items would read alike; add one")
        used |= found
    for field in fields:
        if field not in used:
            raise ConfigError(f"fields: {field!r} is not used in any template; remove it")
