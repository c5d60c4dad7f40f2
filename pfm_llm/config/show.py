"""A resolved config as text, with the origin of every value."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pfm_llm.config.methods import SPECS
from pfm_llm.config.schema import load_config, read_yaml
from pfm_llm.config.settings import leaves
from pfm_llm.config.settle import FOLLOWING
from pfm_llm.config.shipped import find_config
from pfm_llm.config.text import apply_override

_WIDTH = 48


def describe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> str:
    """The resolved settings of a config as YAML; a comment on each line names its origin.

    An origin is ``default``, ``method <name>`` for what the method fixes, the file, ``--set``, or
    ``follows from the number of clients``.

    Args:
        path_or_name: A YAML file, or a shipped config; see `find_config`.
        overrides: ``dotted.key=value`` strings, applied on top of the file.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong.
    """
    path = find_config(path_or_name)
    config = load_config(path, overrides)
    settings = leaves(config.model_dump(mode="json"))
    origins = dict.fromkeys(settings, "default")
    origins |= dict.fromkeys(SPECS[config.method].settings, f"method {config.method}")
    origins |= dict.fromkeys(leaves(read_yaml(path)), path.name)
    for override in overrides:
        changed: dict[str, Any] = {}
        apply_override(changed, override)
        origins |= dict.fromkeys(leaves(changed), "--set")
    following = [key for key in FOLLOWING if settings[key] is None]
    origins |= dict.fromkeys(following, "follows from the number of clients")
    return "\n".join(_lines(config.model_dump(mode="json"), origins)) + "\n"


def _lines(tree: dict[str, Any], origins: dict[str, str], parent: str = "") -> list[str]:
    lines = []
    for name, value in tree.items():
        key = f"{parent}{name}"
        indent = "  " * parent.count(".")
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *_lines(value, origins, f"{key}.")]
        else:
            text = yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]
            lines.append(f"{f'{indent}{name}: {text}':{_WIDTH}}  # {origins[key]}")
    return lines
