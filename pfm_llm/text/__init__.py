"""What the language model reads: prompts, windows of tokens."""
