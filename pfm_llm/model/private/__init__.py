"""The kinds of private parts, one file each, and the one place that makes them."""

import importlib

from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.private.part import PrivatePart
from pfm_llm.protocol.parameters import Sizes

__all__ = ["PrivatePart", "make_private_part"]


def make_private_part(config: ExperimentConfig, sizes: Sizes) -> PrivatePart:
    """The private part of a config; the empty one where it is switched off."""
    private = config.adapters.private
    if not private.enabled:
        return PrivatePart(config, sizes)
    module, _, name = PRIVATE_KINDS[private.kind].path.partition(":")
    made: PrivatePart = getattr(importlib.import_module(module), name)(config, sizes)
    return made
