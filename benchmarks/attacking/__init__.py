"""What `benchmarks/hostile.py` is made of: attacks on a federation, and rounds under attack."""
