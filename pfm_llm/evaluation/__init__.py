"""Honest ranking: metrics, baselines, comparisons, what a private part is worth."""
