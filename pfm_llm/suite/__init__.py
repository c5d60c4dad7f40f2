"""A suite: experiments from one YAML file, with their plan, status, results and report.

``plan`` and ``status`` work without torch; ``running`` trains.
"""
