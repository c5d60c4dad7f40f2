"""The registry of private kinds, one entry each.

A kind is one file in `pfm_llm.model.private`; nothing else in the library knows it by name. The
path is text, so that reading a config imports no torch.
"""

from dataclasses import dataclass

from pfm_llm.config.choices import Schedule


@dataclass(frozen=True)
class KindSpec:
    """The requirements of a private kind on the config.

    Attributes:
        path: The class, as ``module:name``.
        one_user: Whether a client must be a single user, because the kind reads one history.
        schedule: The only valid training schedule; None: any.
        min_steps: Minimum number of private steps in a round.
    """

    path: str
    one_user: bool = False
    schedule: Schedule | None = None
    min_steps: int = 0


PRIVATE_KINDS: dict[str, KindSpec] = {
    "independent": KindSpec("pfm_llm.model.private.lora:IndependentLora"),
    # Its private part is fitted before the basis takes its gradient.
    "shared_basis": KindSpec(
        "pfm_llm.model.private.lora:SharedBasisLora", schedule=Schedule.ALTERNATE, min_steps=1
    ),
    "hyper_lora": KindSpec("pfm_llm.model.private.hyper_lora:HyperLora", one_user=True),
    "taste": KindSpec("pfm_llm.model.private.taste:UserEmbedding", one_user=True),
}
