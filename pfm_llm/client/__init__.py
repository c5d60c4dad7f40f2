"""The client: its histories, its private states and its local training."""
