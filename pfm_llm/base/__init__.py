"""The foundation: errors, files, randomness, processes. It imports no other package of pfm_llm."""
