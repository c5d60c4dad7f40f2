"""What everything stands on: errors, files, randomness, processes. It knows nothing of the rest."""
