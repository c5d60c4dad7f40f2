"""Functions of a config that several modules need."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from pfm_llm.config.choices import Aggregation, Task
from pfm_llm.config.methods import SPECS
from pfm_llm.config.schema import ExperimentConfig, training_hash
from pfm_llm.config.settle import FOLLOWING
from pfm_llm.config.text import find_setting, set_setting

_Model = TypeVar("_Model", bound=BaseModel)

_SERVERS = (
    *("name", "seed", "prompt", "method", "regime", "tasks", "backbone", "items", "ablation"),
    *("window", "adapters", "head", "federation"),
)
_SERVERS_OF_DATA = (
    *("repeats", "split", "held_out", "hold_out_items", "keep_ties", "like_threshold"),
    *("min_interactions", "users_per_client"),
)
_NODES_OF_BACKBONE = "dtype"
"""What follows from a machine: a federation warns where it differs, and goes on."""


def settings_of_server(config: ExperimentConfig) -> dict[str, Any]:
    """The settings that a server decides for all nodes, as JSON values.

    What follows from the number of clients is not among them, since nobody knows it before the
    nodes have counted theirs. The other settings are each node's own: its data, folders, machine.
    """
    tree = config.model_dump(mode="json")
    found = {name: tree[name] for name in _SERVERS if name in tree}
    found["data"] = {name: tree["data"][name] for name in _SERVERS_OF_DATA if name in tree["data"]}
    found["backbone"] = {k: v for k, v in found["backbone"].items() if k != _NODES_OF_BACKBONE}
    for key in FOLLOWING:
        if find_setting(found, key) is not None:
            set_setting(found, key, None)
    return found


def are_of_server(settings: Mapping[str, Any]) -> bool:
    """Whether a tree of settings has only such as a server decides; values are not looked at."""
    data, backbone = settings.get("data", {}), settings.get("backbone", {})
    return (
        settings.keys() <= {*_SERVERS, "data"}
        and isinstance(data, Mapping)
        and data.keys() <= set(_SERVERS_OF_DATA)
        and isinstance(backbone, Mapping)
        and _NODES_OF_BACKBONE not in backbone
    )


def settings_hash(config: ExperimentConfig) -> str:
    """SHA-256, in hex, over `settings_of_server`."""
    text = json.dumps(settings_of_server(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_setting(config: _Model, key: str, value: Any) -> _Model:
    """A copy in which one setting differs; the value is not validated.

    Args:
        config: A config, or a group of settings.
        key: Its dotted key, such as ``output.dir``.
        value: The new value.
    """
    name, _, rest = key.partition(".")
    new = with_setting(getattr(config, name), rest, value) if rest else value
    return config.model_copy(update={name: new})


def like_threshold(config: ExperimentConfig) -> float | None:
    """The lowest rating that counts as a like; None if ``like`` is no task."""
    return config.data.like_threshold if Task.LIKE in config.tasks else None


def changed_settings(saved: ExperimentConfig, current: ExperimentConfig) -> list[str]:
    """One text for each setting that differs and affects training."""
    changed = []
    for section in type(saved).model_fields:
        replaced = saved.model_copy(update={section: getattr(current, section)})
        if training_hash(replaced) != training_hash(saved):
            old, new = (
                leaves(config.model_dump(mode="json").get(section), section)
                for config in (saved, current)
            )
            changed += [
                f"{key} was {old.get(key)}, is {new.get(key)}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
    return changed


def leaves(tree: object, key: str = "") -> dict[str, object]:
    """Dotted key to value of every setting in a tree; ``key`` is the place of the tree."""
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    return {
        leaf: value
        for name, child in tree.items()
        for leaf, value in leaves(child, f"{key}.{name}" if key else name).items()
    }


def learns_met(config: ExperimentConfig) -> bool:
    """Whether ``head.item_met`` has an effect: only a mean shows what few have met."""
    is_sum = config.federation.server.aggregator is Aggregation.MEAN
    return config.head.item_met and is_sum and not SPECS[config.method].shares_nothing
