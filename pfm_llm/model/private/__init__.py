"""The kinds of private parts, one file each."""
