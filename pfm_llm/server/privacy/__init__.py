"""Differential privacy of users: noise on the sum of a round, and the account of a whole run."""
