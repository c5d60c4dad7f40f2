"""What `benchmarks/transfer.py` is made of: two worlds, serving as a user does, and figures."""
