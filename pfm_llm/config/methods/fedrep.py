"""FedRep (Collins et al. 2021, ICML, arXiv 2102.07078): a shared representation, private heads.

::

    n = representation(x; A, B),    u = (P_0 + B_u A_u) n
    head_u <- several local steps with the representation fixed        (algorithm 1, client update)
    (A, B) <- one step with head_u fixed, then averaged

In this system the representation is the shared LoRA with the items' side of the head; the
projection of the user's state is private, as a term of rank `head_rank` on the frozen identity
P_0 (a full one would be 147,456 numbers to learn from a hundred events).
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "independent",
        "adapters.private.on_layers": False,
        "federation.local.schedule": "alternate",
    },
    frozen=("head.state_proj",),
)
