"""The command ``pfm``: typed functions, which import heavy libraries when they are called."""
