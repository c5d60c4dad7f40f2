"""Every client alone: nothing is sent, nothing is received.

::

    h_u = (W + s_p B_u A_u) x

The shared LoRA (B = 0) and the head stay as they were initialised; each client trains its
private LoRA and its private term of the head in the rounds in which it takes part. The lower
bound of all federated methods; see e.g. the ``Local`` rows of arXiv 2102.07078, table 1.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "independent",
        "federation.local.schedule": "joint",
    },
    frozen=("*",),
)
