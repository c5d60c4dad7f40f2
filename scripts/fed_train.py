"""The command `pfm train`, for `accelerate launch -q scripts/fed_train.py`."""

from pfm_llm.cli.main import main

if __name__ == "__main__":
    main("train")
