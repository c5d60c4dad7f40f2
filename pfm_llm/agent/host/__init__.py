"""Many agents on one host: users of a silo, ranked together and kept apart."""
