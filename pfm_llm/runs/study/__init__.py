"""The study of a finished run: all measures of personality, on test."""
