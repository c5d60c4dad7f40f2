"""What one device runs: its histories, its private states, its local training."""
