"""A config, resolved, as text."""

from collections.abc import Sequence
from pathlib import Path

from pfm_llm.config.schema import dump_config, load_config
from pfm_llm.config.shipped import find_config


def describe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> str:
    """Every setting that a config resolves to, as YAML.

    Args:
        path_or_name: A YAML file, or the name of a shipped config.
        overrides: ``dotted.key=value`` strings, applied on top.

    Raises:
        ConfigError: The config cannot be read.
    """
    return dump_config(load_config(find_config(path_or_name), overrides)).rstrip()
