"""`pfm` whose private part is a LoRA on the language model, beside the user embedding.

::

    h_u = (W + s B A + B_p diag(c_u) A_p) x,    c_u = H phi_u

A_p, B_p and H are learned by all clients and aggregated like the shared LoRA. c_u is read off the
history at home, like the user embedding phi_u, and is exported at home as an ordinary LoRA.
`hyper_lora.py` has the equations and the papers.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "hyper_lora",
    }
)
