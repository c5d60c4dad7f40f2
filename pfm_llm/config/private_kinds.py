"""The registry of private kinds, one entry each.

A kind is one file in `pfm_llm.model.private`; nothing else in the library knows it by name. The
path is text, so that reading a config imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pfm_llm.config.choices import Schedule


@dataclass(frozen=True)
class KindSpec:
    """The requirements of a private kind on the config.

    Attributes:
        path: The class, as ``module:name``.
        one_user: Whether a client must be a single user, because the kind reads one history.
        schedule: The only valid training schedule; None: any.
        min_steps: Minimum number of private steps in a round.
        runs_again: Number of adapted layers that run once more in a training step.
        reads: Groups of settings under ``adapters.private`` that are read beside that of its name.
        defaults: Defaults of settings under ``adapters.private`` that are its own. Each stands by
            itself: a config that sets ``rank`` alone keeps this ``alpha``.
        fixed: Settings under ``adapters.private`` that have no effect with it, with the one value
            that they may have.
    """

    path: str
    one_user: bool = False
    schedule: Schedule | None = None
    min_steps: int = 0
    runs_again: int = 0
    reads: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


PRIVATE_KINDS: dict[str, KindSpec] = {
    "independent": KindSpec("pfm_llm.model.private.lora:IndependentLora", fixed={"steps": 0}),
    # Its private part is fitted before the basis takes its gradient.
    "shared_basis": KindSpec(
        "pfm_llm.model.private.lora:SharedBasisLora",
        schedule=Schedule.ALTERNATE,
        min_steps=1,
        fixed={"steps": 0},
    ),
    "hyper_lora": KindSpec(
        "pfm_llm.model.private.hyper_lora:HyperLora",
        one_user=True,
        runs_again=1,
        reads=("taste",),
        defaults={"rank": 16, "alpha": 16},
        fixed={"on_layers": True, "dropout": 0.0},
    ),
    "taste": KindSpec(
        "pfm_llm.model.private.taste:UserEmbedding", one_user=True, fixed={"steps": 0}
    ),
}
