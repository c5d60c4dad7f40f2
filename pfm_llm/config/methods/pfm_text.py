"""`pfm` without any parameter per item: text alone, so that new items are items like others.

::

    score_u,i = score_i(n) + phi_u . T z_i,    phi_u fitted to the history, as for likes
"""

from pfm_llm.config.methods.pfm import SPEC as PFM
from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(settings={**PFM.settings, "head.item_ids": "none", "head.item_bias": False})
