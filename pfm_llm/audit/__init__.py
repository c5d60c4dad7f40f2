"""What a curious server, or a reader of an adapter, learns: attacks on one's own users.

Everything that is attacked is made by the code that a federation runs: updates by its trainer, sums
by its server, words by its masks, noise by its mechanism. Only the attacks are made here.
"""
