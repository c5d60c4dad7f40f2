"""``python -m pfm_llm.cli`` and ``accelerate launch -q -m pfm_llm.cli``: the command ``pfm``."""

from pfm_llm.cli.main import main

if __name__ == "__main__":
    main()
