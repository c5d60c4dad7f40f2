"""What the server does. It imports base, protocol, config and torch, and nothing else."""
