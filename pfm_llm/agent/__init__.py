"""A user's personal agent: local, explained, steered and owned by its user."""
