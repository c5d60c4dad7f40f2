"""A folder of experiments from one YAML: what there is to run, what is done, and the running.

``plan`` and ``status`` answer without torch; ``running`` trains. Nothing is imported here, so that
whoever only asks what is done waits for nothing.
"""
