"""Functions of a config that several modules need."""

from typing import Any, TypeVar

from pydantic import BaseModel

from pfm_llm.config.choices import Aggregation, Task
from pfm_llm.config.methods import SPECS
from pfm_llm.config.schema import ExperimentConfig, training_hash

_Model = TypeVar("_Model", bound=BaseModel)


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
    """Whether ``head.item_met`` has an effect: a median hides which items few clients have met."""
    is_sum = config.federation.server.aggregator is Aggregation.MEAN
    return config.head.item_met and is_sum and not SPECS[config.method].shares_nothing
