"""`pfm` without its private LoRA: the private part is the user embedding alone.

::

    score_u,i = score_i(n) + phi_u . b_i,    phi_u = sum_t w_t a_{y_t} / (n_0 + sum_t w_t)
    like_u,i  = like_i + mean_m psi_u,m . (T_m z_i + G_m e_i + f_m,i)

The private part of a user consists of the embeddings phi_u and psi_u,m, a few numbers per task.
phi_u is a weighted mean over the whole history, in which older items have less weight; the prompt
only shows the newest items. Each psi_u,m is fitted to the user's own likes with a Gaussian prior,
by two Newton steps. The features a, b, f, T and G, the priors and the half-lives form the shared
basis, which is aggregated like the shared LoRA. In training, each event is predicted from the
earlier events only. The basis therefore learns to predict a user's later events from the earlier
ones. `taste.py` has the equations.

phi_u is a factored item model, FISM (Kabbur, Ning and Karypis 2013, KDD, equation 4). The psi_u,m
follow CAVIA (Zintgraf et al. 2019, ICML, arXiv 1810.03642, equations 2 and 3): context parameters
that are fitted anew for every task, in a model that is trained for this fit. Here one client is one
task.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "taste",
    }
)
