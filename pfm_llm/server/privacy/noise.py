"""Numbers that nobody can predict who does not have their key.

A stream is AES-256 in counter mode over zeros (NIST SP 800-38A). With a key of `os.urandom` nobody
can tell it from random bytes. A generator that starts from the seed of an experiment would give the
noise away: the seed is published.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

KEY_BYTES = 32
_WORD_BYTES = 8


class SecretStream:
    """One of 2^64 streams of a key.

    Args:
        key: `KEY_BYTES` secret bytes. A key that somebody knows protects nothing.
        number: Which stream. Whoever takes a stream twice gets the same numbers twice.
    """

    def __init__(self, key: bytes, number: int) -> None:
        counter = number.to_bytes(8, "big") + bytes(8)
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Numbers in (0, 1), float64 [count]: the middles of 2^52 equal parts."""
        words = np.frombuffer(self._cipher.update(bytes(_WORD_BYTES * count)), "<u8")
        # 52 bits and a half fit into a float64, so neither 0 nor 1 comes out.
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, float64: the quantile function of `uniform`.

        The largest possible magnitude is 8.2, beyond which a normal number lies in one of 4e15.
        """
        count = int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy(ndtri(self.uniform(count))).reshape(tuple(shape))
