"""One run, from its config to its report: folders, set-up, rounds, evaluation, study."""
