"""The agent's page and its interfaces for programs, on this machine's loopback alone."""
