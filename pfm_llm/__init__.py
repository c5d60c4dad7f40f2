"""pfm_llm: federated recommendation with a shared and a private adapter on a language model."""

__version__ = "0.1.0"
