"""Ours: a shared LoRA and, at home, a taste vector in a basis that everybody learns.

::

    score_u,i = score_i(n) + phi_u . (T z_i + G e_i)

phi_u, some numbers a user and task, is the private adapter: the minimum, to one Newton step, of
the user's own loss with a Gaussian prior, in which the past fades. T, G, the prior's precision
and the half-life of the past are the basis, which is aggregated like the shared LoRA. In training
each block of events is predicted with the phi fitted to the blocks before it, so that the basis
learns what generalises from a user's past to the user's future. `taste.py` has the equations.

The idea of context parameters that are fitted anew for every task, in a model trained so that
fitting them pays, is that of CAVIA (Zintgraf et al. 2019, ICML, arXiv 1810.03642, equations 2
and 3); here one client is one task.
"""

from pfm_llm.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": True,
        "adapters.private.kind": "taste",
    }
)
