"""The rounds: the exchange between the server and the clients."""
