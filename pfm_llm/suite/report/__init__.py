"""What a suite found, for people: the README's table, plots, and an HTML page that stands alone.

All of it is made from ``results/<suite>/<budget>/*.json`` and from nothing else.
"""
