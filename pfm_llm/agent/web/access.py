"""Who may use the agent: whoever can read its folder."""

import hmac
import re
import secrets
import stat
from pathlib import Path

from pfm_llm.base import files

TOKEN = "token"
"""File in the agent's folder."""
_BYTES = 32
_FORM = re.compile(r"[\w-]{43}")


def own_token(folder: Path) -> str:
    """The token that is kept in an agent's folder; a new one where there is none to be trusted.

    A token that others could read is replaced.

    Raises:
        StorageError: The file cannot be written.
    """
    path = folder / TOKEN
    if path.is_file() and not stat.S_IMODE(path.stat().st_mode) & 0o077:
        kept = path.read_text("ascii", errors="replace").strip()
        if _FORM.fullmatch(kept):
            return kept
    token = secrets.token_urlsafe(_BYTES)
    files.write_text(path, token)
    return token


def is_same(given: str, token: str) -> bool:
    """Whether somebody gave the token; how long it takes does not tell how much was right."""
    return hmac.compare_digest(given.encode(), token.encode())
