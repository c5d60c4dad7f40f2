"""Interactions: their sources, their storage, their splits and their clients."""
