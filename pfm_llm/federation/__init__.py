"""Who talks to whom: the rounds."""
