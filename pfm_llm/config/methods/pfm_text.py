"""`pfm_embedding` without any parameter per item: text alone, so new items are items like others.

::

    score_u,i = score_i(n) + phi_u . T z_i,    phi_u fitted to the history, as for likes
"""

from pfm_llm.config.methods.pfm_embedding import SPEC as EMBEDDING
from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(settings={**EMBEDDING.settings, "head.item_ids": "none", "head.item_bias": False})
