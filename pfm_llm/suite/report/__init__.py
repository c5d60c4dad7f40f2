"""The report of a suite: the README's table, plots, and a self-contained HTML page.

All of it is made from ``results/<suite>/<budget>/*.json`` alone.
"""
