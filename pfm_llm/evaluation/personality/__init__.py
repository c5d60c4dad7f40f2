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
