"""Measures of personality: the gain from one's own private part, and the loss with a stranger's.

Each measure takes numbers per user or per target and returns named figures, `Estimate`; a positive
figure is better for the user. `named_estimates` joins the figures of a run.

| measure | names |
|---|---|
| gain | ``gain_log_rank``, ``gain_ndcg``, ``gain_auc``, and ``…_over_<reference>`` |
| swap | ``swap_<quality>``, ``identification`` |
| harm | ``not_harmed``, ``harm_<grouping>_<label>`` |
| integrity | ``integrity_rbo``, ``integrity_rbo_retuned`` |
| new items | ``new_items``, ``new_items_over_chance``, and ``…_shared``, ``…_own`` |
| their places | ``new_items_percentile``, ``new_items_among_new``, and ``…_shared``, ``…_cosine`` |
| in lists | ``new_items_in_top_ten``, and ``…_shown``; ``new_items_shown_ndcg`` |
| asked for | ``new_items_in_targets`` |
| memory, cold start | ``memory_<items>``, ``cold_start_<items>``, and ``…_shared``, ``…_own`` |
| beside none | ``cold_start_<items>_over_none``, and ``…_shared`` |
"""
