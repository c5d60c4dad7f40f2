"""The command `pfm recommend`."""

from pfm_llm.cli.main import main

if __name__ == "__main__":
    main("recommend")
