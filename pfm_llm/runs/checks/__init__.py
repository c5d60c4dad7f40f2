"""What can be known to fail, or to mean little, before a run trains."""
