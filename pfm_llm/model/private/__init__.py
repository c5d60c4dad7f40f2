"""The kinds of private parts, one file each, and the one place that makes them."""

import importlib

from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.model.private.part import PrivateContext, PrivatePart, Sizes

__all__ = ["PrivateContext", "PrivatePart", "Sizes", "make_private_part"]


def make_private_part(context: PrivateContext) -> PrivatePart:
    """The private part of a config; the empty one where it is switched off."""
    if not context.settings.enabled:
        return PrivatePart(context)
    module, _, name = PRIVATE_KINDS[context.settings.kind].path.partition(":")
    made: PrivatePart = getattr(importlib.import_module(module), name)(context)
    return made
