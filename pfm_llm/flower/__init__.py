"""Flower as a transport between a server and its nodes: the only package that imports flwr.

Flower starts a process for each message to a node. That process, `pfm_llm.flower.client_app`, only
hands bytes to the worker of the node (`pfm_llm.node`), and imports neither torch nor transformers.
"""
