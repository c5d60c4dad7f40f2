"""Randomness as a pure function of (seed, purpose, round, client).

No code in pfm_llm uses a global random state; all random numbers come from these generators. A
resumed run, another number of processes and another order of clients draw the same numbers.
"""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, round_number: int = 0, client: str = "") -> int:
    """Mix the parts into one 63-bit seed.

    Args:
        seed: The experiment's seed.
        purpose: The use of the numbers, such as ``"cohort"``.
        round_number: The round, from 1; 0 where none applies.
        client: The client's id; empty where none applies.

    Returns:
        An integer in [0, 2**63), equal for equal parts on every machine.
    """
    text = f"{seed}\x1f{purpose}\x1f{round_number}\x1f{client}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, round_number: int = 0, client: str = "") -> torch.Generator:
    """A fresh CPU ``torch.Generator`` for these parts; see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, round_number, client))


def numpy_generator(
    seed: int, purpose: str, round_number: int = 0, client: str = ""
) -> np.random.Generator:
    """A fresh ``numpy`` generator for these parts; see `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, round_number, client))
