"""One run from its config to its report: folders, wiring, rounds, evaluation, study."""
