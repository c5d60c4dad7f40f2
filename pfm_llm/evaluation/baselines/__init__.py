"""Central baselines that need no gradient.

All are fitted once, on training histories alone, and then score any histories of the same
catalogue; hyperparameters are chosen on validation and nothing is refitted for the test. `likes`
holds those of the task ``like``.
"""
