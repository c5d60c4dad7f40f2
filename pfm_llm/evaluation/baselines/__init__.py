"""Central baselines that need no gradient.

Each baseline is fitted once on training histories and then scores any histories of the same
catalogue. Hyperparameters are chosen on validation, and nothing is refitted for the test. `likes`
has the baselines of the task ``like``.
"""
