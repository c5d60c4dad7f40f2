"""A federation of real processes on this machine: keys, nodes, SuperLink, SuperNodes, a run."""
