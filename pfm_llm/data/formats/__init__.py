"""Readers: from the files that people have to tables of text."""
