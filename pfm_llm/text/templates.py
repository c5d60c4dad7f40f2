r"""The templates of prompts: text with placeholders and optional parts.

- ``{field}`` is replaced by the value of that name.
- ``[...]`` is an optional part, left out when any placeholder in it is empty. Parts do not nest.
- A literal bracket or brace is doubled: ``[[``, ``]]``, ``{{``, ``}}``.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pfm_llm.base.errors import ConfigError

_TOKEN = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{(?P<field>\w+)\}|[\[\]{}]|[^\[\]{}]+")


def render(template: str, values: Mapping[str, str]) -> str:
    """The text of a template.

    Args:
        template: A template that `placeholders` accepts.
        values: The value of each placeholder; an empty one drops its optional part.
    """
    return "".join(part.render(values) for part in _parse(template))


def placeholders(template: str) -> set[str]:
    """The names of the placeholders of a template.

    Raises:
        ConfigError: A bracket or brace is unmatched, or an optional part has no placeholder.
    """
    return {text for part in _parse(template) for text, is_field in part.pieces if is_field}


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
