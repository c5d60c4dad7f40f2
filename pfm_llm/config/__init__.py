"""One YAML, one frozen tree of settings. Nothing here imports torch."""
