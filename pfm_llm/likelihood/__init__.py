"""The likelihood scorer: the language model's own vocabulary says yes or no to an item."""
