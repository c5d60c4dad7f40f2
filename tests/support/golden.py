"""Texts that a test compares as a whole: read the difference, then keep the new one or mend."""

import os
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
RENEW = "PFM_LLM_RENEW_GOLDEN"


def assert_golden(name: str, text: str) -> None:
    """The text is that of ``tests/golden/<name>``.

    With `RENEW` set in the environment the file is written anew, for a reviewer to judge.
    """
    path = GOLDEN / name
    if os.environ.get(RENEW):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{name} differs; {RENEW}=1 renews it"
