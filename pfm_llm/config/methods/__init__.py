"""The methods that can be compared: one file each, with its paper and its equations.

All methods run on the same backbone, head, data, split and budget. A method fixes a set of settings
(`MethodSpec.settings`) and leaves a set of shared tensors untrained (`MethodSpec.frozen`). The
config decides everything else. In the equations h = W x is a frozen linear layer and u is a user; a
quantity with the index u never leaves the client.
"""

import copy
import importlib
from enum import StrEnum
from typing import Any

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.methods.spec import MethodSpec
from pfm_llm.config.text import find_setting, set_setting


class Method(StrEnum):
    """The methods by name; each has a file of its name."""

    CENTRAL = "central"
    LOCAL_ONLY = "local_only"
    SHARED_ONLY = "shared_only"
    FFA_LORA = "ffa_lora"
    FEDSA_LORA = "fedsa_lora"
    FEDREP = "fedrep"
    PFM = "pfm"
    PFM_EMBEDDING = "pfm_embedding"
    PFM_TEXT = "pfm_text"
    CUSTOM = "custom"


SPECS: dict[Method, MethodSpec] = {
    method: importlib.import_module(f"pfm_llm.config.methods.{method}").SPEC for method in Method
}
"""Method to the ``SPEC`` of the file of its name."""


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
            others = [other for other, spec in SPECS.items() if spec.settings.get(key) == found]
            fixed_by = f" ({found} is fixed by {', '.join(others)})" if others else ""
            raise ConfigError(
                f"{origin}: method {method} fixes {key}: {value}, but the config says {found}; "
                f"leave it out, or set method: custom, which fixes nothing{fixed_by}"
            )
        set_setting(tree, key, value)
    return tree
