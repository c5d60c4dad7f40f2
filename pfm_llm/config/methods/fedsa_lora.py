"""FedSA-LoRA (Guo et al. 2025, ICLR, arXiv 2410.01463): A is shared, B stays at home.

::

    h_u = (W + s B_u A) x,    A <- mean_u A_u        (section 3.2)

In this system: the private adapter has the kind ``shared_basis`` (its A is the basis that all
clients train), and the shared LoRA is left at zero: give `adapters.private` the rank and alpha
that other methods give to the shared adapter.
B_u is fitted before the gradient of A is taken, because A has no gradient while B_u is zero, its
initial value. The paper trains both at once. The head is shared and has no private term
(``head_rank: 0``).
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "shared_basis",
        "adapters.private.head_rank": 0,
        "federation.local.schedule": "alternate",
    },
    frozen=("lora.*",),
)
