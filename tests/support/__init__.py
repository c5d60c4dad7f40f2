"""Tiny models, doubles and tools that tests share; nothing here is a test."""
