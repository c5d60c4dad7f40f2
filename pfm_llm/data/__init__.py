"""Interactions: where they come from, how they are held, split and dealt to clients."""
