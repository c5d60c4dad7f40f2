"""The methods that can be compared: one file each, with its paper and its equations.

All methods run on the same backbone, head, data, split and budget. A method fixes a set of settings
(`MethodSpec.settings`) and leaves a set of shared tensors untrained (`MethodSpec.frozen`). The
config decides everything else. In the equations h = W x is a frozen linear layer and u is a user; a
quantity with the index u never leaves the client.
"""

import copy
from enum import StrEnum
from typing import Any

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.methods.central import SPEC as CENTRAL
from pfm_llm.config.methods.custom import SPEC as CUSTOM
from pfm_llm.config.methods.fedrep import SPEC as FEDREP
from pfm_llm.config.methods.fedsa_lora import SPEC as FEDSA_LORA
from pfm_llm.config.methods.ffa_lora import SPEC as FFA_LORA
from pfm_llm.config.methods.local_only import SPEC as LOCAL_ONLY
from pfm_llm.config.methods.pfm import SPEC as PFM
from pfm_llm.config.methods.pfm_text import SPEC as PFM_TEXT
from pfm_llm.config.methods.shared_only import SPEC as SHARED_ONLY
from pfm_llm.config.methods.spec import MethodSpec
from pfm_llm.config.text import find_setting, set_setting


class Method(StrEnum):
    """The methods by name."""

    CENTRAL = "central"
    LOCAL_ONLY = "local_only"
    SHARED_ONLY = "shared_only"
    FFA_LORA = "ffa_lora"
    FEDSA_LORA = "fedsa_lora"
    FEDREP = "fedrep"
    PFM = "pfm"
    PFM_TEXT = "pfm_text"
    CUSTOM = "custom"


SPECS: dict[Method, MethodSpec] = {
    Method.CENTRAL: CENTRAL,
    Method.LOCAL_ONLY: LOCAL_ONLY,
    Method.SHARED_ONLY: SHARED_ONLY,
    Method.FFA_LORA: FFA_LORA,
    Method.FEDSA_LORA: FEDSA_LORA,
    Method.FEDREP: FEDREP,
    Method.PFM: PFM,
    Method.PFM_TEXT: PFM_TEXT,
    Method.CUSTOM: CUSTOM,
}


def with_method(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """A tree of settings with those that its method fixes.

    Args:
        tree: Settings as read from YAML; without ``method`` it is `Method.PFM`. A tree with an
            unknown method is returned as it is, for validation to refuse.
        origin: Where the tree is from, for messages.

    Raises:
        ConfigError: The tree sets a key otherwise than its method does.
    """
    name = tree.get("method", Method.PFM.value)
    if name not in list(Method):
        return tree
    method = Method(name)
    tree = copy.deepcopy(tree)
    for key, value in SPECS[method].settings.items():
        found = find_setting(tree, key)
        if found is not None and found != value:
            raise ConfigError(
                f"{origin}: method {method} fixes {key}: {value}, but the config says {found}; "
                "leave it out, or set method: custom, which fixes nothing"
            )
        set_setting(tree, key, value)
    return tree


__all__ = ["SPECS", "Method", "MethodSpec", "with_method"]
