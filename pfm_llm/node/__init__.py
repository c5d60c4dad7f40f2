"""A node: a resident worker that holds the data of some clients, and answers calls.

It holds the backbone, the data, the private store and the caches. An engine of federations, such as
Flower, reaches none of them. `pfm_llm.node.client` and `pfm_llm.node.frames` import neither torch
nor transformers, so that a process that is started for each message can use them.
`pfm_llm.node.server_run` is the other side: a run of a server over nodes.
"""
