"""Personality, measured: what a private adapter gives its user, and what a stranger's would.

Each measure takes numbers per user or per target and returns named figures, `Estimate`, in which
positive is better for the user; `named_estimates` puts those of a run together.

| measure | names |
|---|---|
| gain | ``gain_log_rank``, ``gain_ndcg``, ``gain_auc``, and ``…_over_<reference>`` |
| swap | ``swap_<quality>``, ``identification`` |
| harm | ``not_harmed``, ``harm_<grouping>_<label>`` |
| integrity | ``integrity_rbo``, ``integrity_rbo_retuned`` |
| new items | ``new_items``, ``new_items_over_chance``, and ``…_shared``, ``…_own`` |
| memory, cold start | ``memory_<items>``, ``cold_start_<items>``, and ``…_shared``, ``…_own`` |
"""

from pfm_llm.evaluation.personality.curves import COLD_START, MEMORY, curve_figures
from pfm_llm.evaluation.personality.estimates import (
    RANK_QUALITIES,
    Bootstrap,
    Estimate,
    align,
    estimate,
    named_estimates,
    paired_difference,
    user_quality,
)
from pfm_llm.evaluation.personality.gain import auc_gain, rank_gain
from pfm_llm.evaluation.personality.groups import age_band, deciles, slug, user_groupings
from pfm_llm.evaluation.personality.harm import (
    GroupHarm,
    group_harm,
    harm_figures,
    holm,
    not_harmed,
)
from pfm_llm.evaluation.personality.integrity import integrity, rank_biased_overlap
from pfm_llm.evaluation.personality.new_items import new_item_figures
from pfm_llm.evaluation.personality.swap import identification, swap_loss

__all__ = [
    "COLD_START",
    "MEMORY",
    "RANK_QUALITIES",
    "Bootstrap",
    "Estimate",
    "GroupHarm",
    "age_band",
    "align",
    "auc_gain",
    "curve_figures",
    "deciles",
    "estimate",
    "group_harm",
    "harm_figures",
    "holm",
    "identification",
    "integrity",
    "named_estimates",
    "new_item_figures",
    "not_harmed",
    "paired_difference",
    "rank_biased_overlap",
    "rank_gain",
    "slug",
    "swap_loss",
    "user_groupings",
    "user_quality",
]
