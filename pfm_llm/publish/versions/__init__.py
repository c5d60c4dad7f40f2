"""Versions of a published adapter: list them, compare two, check their chain, roll back."""
