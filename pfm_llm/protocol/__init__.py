"""The messages between clients and server: states, updates, and the contract of updates."""
