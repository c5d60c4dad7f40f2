"""The server. This package imports base, protocol, config and torch.

`server.privacy` also needs a cipher, the normal distribution, and the optional `dp-accounting`.
"""
