"""Updates as words modulo 2^32, and streams of masks over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from pfm_llm.base.errors import ContractError
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.types import ClientUpdate, Refusal, Tensors

Words = npt.NDArray[np.uint32]

WORD_BYTES = 4
_LARGEST = 2**31 - 1
_BLOCK = 2**15
"""Words that all masks are added to before the next ones, so that they stay in the cache."""

_MOST_LOSS = 1024.0
"""A larger loss (nats), of either sign, travels as this."""


@dataclass(frozen=True)
class MaskedSum:
    """What the server learns of a cohort.

    Attributes:
        tensors: The sum of weight times update, float64, by name.
        weight: The sum of weights: of 1, or of numbers of examples.
        weighted_loss: The sum of losses (nats), each times its weight.
        num_examples: The sum of examples.
    """

    tensors: Tensors
    weight: float
    weighted_loss: float
    num_examples: int


@dataclass(frozen=True)
class FixedPoint:
    """Updates as words whose sum over a cohort cannot overflow.

    A number x of an update becomes the integer nearest to s w x, modulo 2^32. w is 1, or with
    ``by_examples`` the client's share of ``most_examples``. s is the largest power of two with
    s C <= (2^31 - 1) / n, for updates of norm at most C, which bounds each number as well, and n
    clients. A power of two makes the product exact, so the mean with uniform weights is off by at
    most 1 / (2 s) < n C / 2^31 in each number. With ``by_examples`` it is off by ``most_examples``
    over the mean number of examples times that, and by 2^-23 of itself, as w is rounded as well.

    Two words follow those of the tensors: the number of examples (up to ``most_examples``), and
    w times the loss.

    Attributes:
        specs: The tensors of an update, as the contract lists them.
        norm: The bound C of the stage ``clip``.
        cohort_size: The number n of clients.
        most_examples: The largest number of examples that counts; n times it is below 2^31.
        by_examples: Whether the weights are numbers of examples.
    """

    specs: Mapping[str, TensorSpec]
    norm: float
    cohort_size: int
    most_examples: int
    by_examples: bool

    @property
    def num_words(self) -> int:
        """Words of a masked update."""
        return self._num_numbers + 2

    @property
    def scale(self) -> float:
        """The factor s."""
        return self._power_of_two(self.norm)

    @property
    def largest_rounding(self) -> float:
        """The largest norm by which rounding moves an update that counts 1."""
        return 0.5 / self.scale * math.sqrt(self._num_numbers)

    def encode(self, update: ClientUpdate) -> Words:
        """The words of an update that fits the contract, uint32 [num_words].

        Raises:
            ContractError: It is not finite, or a number is beyond the bound: nobody could see that
                later.
        """
        examples = min(update.num_examples, self.most_examples)
        weight = examples / self.most_examples if self.by_examples else 1.0
        flat = torch.cat([update.delta[name].flatten() for name in self.specs])
        low, high = map(float, torch.aminmax(flat.mul_(weight * self.scale).round_()))
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(update.loss)):
            raise ContractError(
                f"client {update.client_id!r:.80}: its update is not finite, so it sends none",
                Refusal.NOT_FINITE,
            )
        if max(-low, high) > round(self.norm * self.scale):
            raise ContractError(
                f"client {update.client_id!r:.80}: a number of its update is beyond the bound "
                f"{self.norm:g} of clip after all stages, so it sends none",
                Refusal.TOO_LARGE,
            )
        loss = weight * max(-_MOST_LOSS, min(update.loss, _MOST_LOSS))
        integers = np.empty(self.num_words, np.int32)
        torch.from_numpy(integers[:-2]).copy_(flat)
        integers[-2:] = examples, round(loss * self._power_of_two(_MOST_LOSS))
        return integers.view(np.uint32)

    def decode(self, words: Words, num_updates: int) -> MaskedSum:
        """What the sum of so many updates' words stands for.

        Raises:
            ContractError: It cannot be the sum of updates within the bound: a client did not clip,
                or masks did not come off.
        """
        integers = torch.from_numpy(words.view(np.int32)).double()
        examples = int(integers[-2])
        unit = float(self.most_examples) if self.by_examples else 1.0
        weight = float(examples) if self.by_examples else float(num_updates)
        numbers = integers[:-2].mul_(unit / self.scale)
        norm = float(torch.linalg.vector_norm(numbers))
        rounding = num_updates * unit / self.scale * math.sqrt(self._num_numbers)
        fits = num_updates <= examples <= num_updates * self.most_examples
        if not fits or norm > weight * self.norm + rounding:
            raise ContractError(
                f"the sum of {num_updates} masked updates has norm {norm:.3g} and {examples} "
                "examples, which updates within the bound of clip cannot have; a client did not "
                "keep to it",
                Refusal.TOO_LARGE,
            )
        parts = numbers.split([math.prod(spec.shape) for spec in self.specs.values()])
        return MaskedSum(
            {
                name: part.view(spec.shape)
                for (name, spec), part in zip(self.specs.items(), parts, strict=True)
            },
            weight,
            float(integers[-1]) * unit / self._power_of_two(_MOST_LOSS),
            examples,
        )

    @property
    def _num_numbers(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    def _power_of_two(self, bound: float) -> float:
        _, exponent = math.frexp(_LARGEST // self.cohort_size / bound)
        return math.ldexp(1.0, exponent - 1)


def are_words(value: object, count: int) -> bool:
    """Whether a value is so many words and nothing else, whoever sent it."""
    return type(value) is np.ndarray and (value.dtype, value.shape) == (np.uint32, (count,))


def no_words(count: int) -> Words:
    """A sum of nothing: uint32 zeros [count]."""
    return np.zeros(count, np.uint32)


def add_masks(words: Words, masks: Sequence[tuple[bytes, int]]) -> None:
    """Add streams of uniform words, modulo 2^32 and in place.

    A stream is AES-256 in counter mode over zeros, from the counter 2: what AES-256-GCM makes of
    zeros with the nonce 0 (NIST SP 800-38D), without its tag. OpenSSL's GCM uses wider instructions
    than its plain counter mode and is a fifth faster, tag and all.

    Args:
        words: uint32 [N].
        masks: For each stream its key, of 32 bytes that are used for nothing else, and its sign: 1,
            or -1 to subtract it.
    """
    mode = modes.GCM(bytes(12))
    streams = [(Cipher(algorithms.AES(key), mode).encryptor(), sign) for key, sign in masks]
    zeros = bytes(_BLOCK * WORD_BYTES)
    buffer = bytearray(len(zeros) + 15)  # as `update_into` wants it
    stream_words = np.frombuffer(buffer, "<u4", _BLOCK)
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        mask = stream_words[: len(block)]
        for stream, sign in streams:
            stream.update_into(zeros, buffer)
            (np.add if sign > 0 else np.subtract)(block, mask, out=block)
