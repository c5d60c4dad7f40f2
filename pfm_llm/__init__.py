"""pfm_llm: a federated recommender on a small language model.

Clients train a shared LoRA, a recommender head and item features. A user's private part is an
embedding that the client computes at home; private LoRA adapters are kinds of it as well.

The public names are those of ``__all__``. Each is imported when it is first used, so that
importing pfm_llm costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfm_llm.base.errors import PfmError
    from pfm_llm.data.frames import load_dataset
    from pfm_llm.federated import FederatedRecommender
    from pfm_llm.recommender import Recommendation, Recommender

__version__ = "0.2.0"

__all__ = ["FederatedRecommender", "PfmError", "Recommendation", "Recommender", "load_dataset"]

_MODULES = {
    "FederatedRecommender": "federated",
    "PfmError": "base.errors",
    "Recommendation": "recommender",
    "Recommender": "recommender",
    "load_dataset": "data.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
