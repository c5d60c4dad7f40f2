"""What crosses the wire: states, updates, and the contract that updates must meet."""
