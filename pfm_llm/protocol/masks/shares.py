"""Shamir's secret sharing (Communications of the ACM 22(11), 1979) of 32-byte secrets.

A polynomial of degree t - 1 over the field of 2^521 - 1 elements has the secret at 0 and uniform
coefficients else. Its values at t places give the secret, those at fewer places tell nothing of it.
"""

from collections.abc import Sequence

from pfm_llm.protocol.masks.agreement import KEY_BYTES, Draw

PRIME = 2**521 - 1
"""A Mersenne prime; drawing a coefficient modulo it from 88 bytes is uniform up to 2^-183."""

SHARE_BYTES = 66
_DRAWN_BYTES = 88


def split(secret: bytes, threshold: int, count: int, draw: Draw) -> list[int]:
    """Shares at the places 1, 2, …, ``count``, any ``threshold`` of which give the secret.

    Args:
        secret: 32 bytes.
        threshold: From 1 to ``count``.
        count: Number of shares.
        draw: Secret randomness.
    """
    drawn = (int.from_bytes(draw(_DRAWN_BYTES), "big") for _ in range(threshold - 1))
    coefficients = [*(number % PRIME for number in drawn), int.from_bytes(secret, "big")]
    shares = []
    for place in range(1, count + 1):
        value = 0
        for coefficient in coefficients:
            value = value * place + coefficient
        shares.append(value % PRIME)
    return shares


def weights_at_zero(places: Sequence[int]) -> list[int]:
    """The factor of each place's share in the secret (Lagrange's interpolation at 0)."""
    weights = []
    for own in places:
        above = below = 1
        for other in places:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def joined(shares: Sequence[int], weights: Sequence[int]) -> bytes | None:
    """The secret, from as many shares as the threshold.

    Args:
        shares: Those of some places.
        weights: `weights_at_zero` of the same places, in the same order.

    Returns:
        32 bytes; None if the shares are not of one secret of that length.
    """
    value = sum(w * share for w, share in zip(weights, shares, strict=True)) % PRIME
    return value.to_bytes(KEY_BYTES, "big") if value.bit_length() <= 8 * KEY_BYTES else None
