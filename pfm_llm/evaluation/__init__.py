"""Evaluation: ranking, metrics, baselines, comparisons, and the gain of a private part."""
