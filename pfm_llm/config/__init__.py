"""The config: one YAML file becomes one frozen tree of settings. Nothing here imports torch."""
