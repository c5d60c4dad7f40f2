"""Ours: a shared LoRA and, at home, a taste vector in a basis that everybody learns.

::

    score_u,i = score_i(n) + phi_u . b_i,    phi_u = sum_t w_t a_{y_t} / (n_0 + sum_t w_t)
    like_u,i  = like_i + mean_m psi_u,m . (T_m z_i + G_m e_i + f_m,i)

phi_u and all psi_u,m, some numbers a user and task, are the private adapter. phi_u reads all of
the history, of which the prompt shows the newest; in it the past fades. Each psi_u,m is the
minimum, to two Newton steps, of the user's own loss with a Gaussian prior. The embeddings a, b and
f, T, G, the priors and the half-lives of the past are the basis, which is aggregated like the
shared LoRA. In training every event is predicted with what the past alone gives, so that the basis
learns what generalises from a user's past to the user's future. `taste.py` has the equations.

What is read is a factored item model, FISM (Kabbur, Ning and Karypis 2013, KDD, equation 4). The
idea of context parameters that are fitted anew for every task, in a model trained so that
fitting them pays, is that of CAVIA (Zintgraf et al. 2019, ICML, arXiv 1810.03642, equations 2
and 3); here one client is one task.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "taste",
    }
)
