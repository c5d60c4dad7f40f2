"""Recommendations for users, one or many in a pass, from a run or from a published adapter."""

from pfm_llm.recommender.recommender import Owner, Recommendation, Recommender

__all__ = ["Owner", "Recommendation", "Recommender"]
