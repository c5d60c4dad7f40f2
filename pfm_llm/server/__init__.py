"""The server. This package imports base, protocol, config and torch, and nothing else."""
