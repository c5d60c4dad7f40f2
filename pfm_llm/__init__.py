"""pfm_llm: a federated recommender on a small language model.

Clients train a shared LoRA, a recommender head and item features. A user's private part is an
embedding that the client computes at home; private LoRA adapters are kinds of it as well.
"""

__version__ = "0.2.0"
