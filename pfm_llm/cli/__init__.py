"""The command ``pfm``: typed functions, which import what is heavy when they are called."""
