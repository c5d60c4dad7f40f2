"""Our method: a shared LoRA that the server merges, and a private LoRA that stays at home.

::

    h_u = (W + s B A + B_p diag(c_u) A_p) x,    c_u = H phi_u        (a layer of the model)
    score_u,i = score_i(n) + v_i . (diag(phi_u) A_s n + phi_u)       (the layer of scores)
    phi_u = sum_t w_t a_{y_t} / (n_0 + sum_t w_t)

The second line is a LoRA too: v_i are the columns of its B, phi_u is private, and its bias is the
user embedding of `pfm_embedding`, which is this method without the LoRAs. A user's private part is
phi_u with what follows from it: a few numbers, read off the whole history at home. It is exported
there as an ordinary LoRA. A_p, B_p, H, A_s and the features a, v are learned by all clients and
aggregated like the shared LoRA. In training, each event is predicted from the earlier events only.

The idea of two adapters is that of arXiv 2506.11563. `hyper_lora.py` has all equations and the
papers that they follow.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "hyper_lora",
    }
)
