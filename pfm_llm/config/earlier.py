"""Config trees in results of earlier versions, converted to trees of this version."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfm_llm.config.methods import Method
from pfm_llm.config.schema import ExperimentConfig, parse_config, read_yaml
from pfm_llm.config.text import find_setting, set_setting

CONSTANTS: dict[str, Any] = {
    "federation.local.private_weight_decay": 0.0,
    "federation.server.beta2": 0.99,
    "federation.server.eps": 1e-8,
    "federation.server.lr_taste": 1e-2,
    "federation.server.lr_taste_items": 3e-2,
    "federation.server.lr_taste_like": 3e-3,
    "federation.server.lr_taste_like_items": 1e-2,
    "adapters.private.taste.like_fits": 4,
    "adapters.private.taste.read_events": 5.0,
    "adapters.private.taste.precision": 30.0,
    "adapters.private.taste.half_life": 20.0,
    "adapters.private.taste.half_life_like": 100.0,
    "adapters.private.taste.block": 8,
}
"""Dotted key of a former setting to the value that is now a constant."""

BEFORE: dict[str, Any] = {
    "window.reading": "tokens",
    "items.encoder": "backbone",
    "head.item_met": False,
    "head.prior_events": None,
    "head.item_dropout": 0.0,
    "adapters.private.taste.dropout": None,
    "federation.local.horizon": 1,
}
"""Dotted key of a later setting to what was done before it was there."""

_METHODS = {
    ("pfm", "taste"): Method.PFM_EMBEDDING,
    ("pfm_lora", "hyper_lora"): Method.PFM,
}
"""A former name of a method, with its private kind, to the present name."""


def load_saved(path: Path) -> ExperimentConfig:
    """Read the config that a run of this version or of an earlier one has written.

    Raises:
        ConfigError: See `load_config`.
    """
    return parse_config(from_earlier(read_yaml(path)), origin=str(path))


def from_earlier(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config tree of an earlier version to a tree of this one.

    Args:
        tree: Every setting of its version, or all those of some sections. A setting of
            `CONSTANTS` whose value differs from the constant stays in the tree, and validation
            refuses it. A whole tree of this version is returned unchanged.
    """
    present = copy.deepcopy(dict(tree))
    if "method" in present and present["method"] is None:
        present["method"] = Method.CUSTOM.value
    named = (present.get("method"), find_setting(present, "adapters.private.kind"))
    if named in _METHODS:
        present["method"] = _METHODS[named].value
    for key, value in CONSTANTS.items():
        if find_setting(present, key) == value:
            parent, _, last = key.rpartition(".")
            del find_setting(present, parent)[last]
    for key, value in BEFORE.items():
        if find_setting(present, key) is None:
            set_setting(present, key, value)
    return present
