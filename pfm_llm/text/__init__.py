"""The input of the language model: prompts, and windows of tokens."""
