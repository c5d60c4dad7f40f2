"""Overrides and dotted keys of settings, and messages about wrong keys."""

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pfm_llm.base.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value``, the value in YAML, in a tree of settings.

    Raises:
        ConfigError: The override has another form, its value is no YAML, or a parent in its key is
            no group of settings.
    """
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: expected dotted.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: {value!r} is not valid YAML; put a text in quotation marks: "
            f"{key}='\"…\"'"
        ) from error
    set_setting(tree, key, parsed)


def set_setting(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a tree of settings, which is changed.

    Raises:
        ConfigError: A parent in the key is no group of settings.
    """
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"setting {key}: {parent} is a value, not a group; correct the key")
        tree = child
    tree[last] = value


def find_setting(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in a tree of settings, or None."""
    found: Any = tree
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def validated(tree: Mapping[str, Any], model: type[_Model], origin: str) -> _Model:
    """A tree of settings as an instance of a pydantic model.

    Args:
        tree: The settings.
        model: The model.
        origin: Where the tree is from, for messages.

    Raises:
        ConfigError: A key or value is wrong; the message names each with its dotted key, and for an
            unknown key the nearest valid one.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(problem, model)}" for problem in error.errors())
        raise ConfigError(f"{origin}:\n{lines}") from error


def _explain(problem: Any, root: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":
        return f"{'.'.join(location) or 'config'}: {problem['msg']}"
    message = f"unknown key {'.'.join(location)}"
    valid = _keys_at(location[:-1], root)
    nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
    if not nearest:
        return f"{message}; valid here: {', '.join(valid)}"
    return f"{message}; did you mean {'.'.join([*location[:-1], nearest[0]])}?"


def _keys_at(location: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in location:
        # tuple[Entry, ...] and dict[str, Entry]: the part is the place of an entry
        entries = [option for option in typing.get_args(model) if hasattr(option, "model_fields")]
        model = entries[0] if entries else model.model_fields[part].annotation
        if isinstance(model, types.UnionType):  # Settings | None
            model = next(o for o in typing.get_args(model) if isinstance(o, type))
    return list(model.model_fields)
