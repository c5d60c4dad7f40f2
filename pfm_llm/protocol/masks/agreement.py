"""Keys of a masked round: what two clients agree on, and what is derived from it.

X25519 (RFC 7748) agrees, HKDF-SHA256 (RFC 5869) derives a key for each use, AES-256-GCM seals what
one client sends to another through the server, and Ed25519 (RFC 8032) signs.
"""

import functools
import hashlib
import struct
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pfm_llm.base.errors import MaskError

KEY_BYTES = 32
"""Bytes of every key and seed."""

Identity = Ed25519PrivateKey
"""The long-term key of a client, with which it signs."""

Draw = Callable[[int], bytes]
"""So many random bytes that nobody else knows, as `secrets.token_bytes` gives them."""

_NONCE_BYTES = 12
_NUM_REMEMBERED = 4096


class KeyPair:
    """An X25519 key, and its public part.

    Args:
        private: 32 secret bytes.

    Attributes:
        private: The same.
        public: 32 bytes for everybody.
    """

    def __init__(self, private: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(private)
        self.private = private
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The secret that the owner of another key also finds, 32 bytes.

        Raises:
            MaskError: ``public`` is no key, or a point of small order.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise MaskError("a client advertised a public key that is none") from error


def packed(*parts: bytes | str) -> bytes:
    """The parts as one text that no other parts have: their number and lengths, then themselves."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    lengths = struct.pack(f">{len(encoded) + 1}I", len(encoded), *map(len, encoded))
    return b"".join((lengths, *encoded))


def digest(*parts: bytes | str) -> bytes:
    """SHA-256 over `packed` parts."""
    return hashlib.sha256(packed(*parts)).digest()


def derived(secret: bytes, use: str, *parts: bytes | str) -> bytes:
    """A key of 32 bytes for one use; keys for other uses and parts tell nothing of it."""
    info = packed("pfm_llm masks", use, *parts)
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def own_mask(context: bytes, client_id: str, seed: bytes) -> bytes:
    """The key of the stream that a client adds from its seed."""
    return derived(seed, "own mask", context, client_id)


def pair_mask(context: bytes, secret: bytes, own: str, other: str) -> tuple[bytes, int]:
    """The key of the stream of two clients, from what they agree on, and its sign at ``own``."""
    first, second = sorted((own, other))
    return derived(secret, "pair mask", context, first, second), 1 if own == first else -1


def channel(context: bytes, secret: bytes, own: str, other: str) -> bytes:
    """The key of what two clients send each other, from what they agree on."""
    return derived(secret, "channel", context, *sorted((own, other)))


def sealed(key: bytes, content: bytes, sender: str, receiver: str) -> bytes:
    """Encrypt and authenticate; each of two clients seals one message with their `channel`."""
    return AESGCM(key).encrypt(_nonce(sender, receiver), content, None)


def opened(key: bytes, message: bytes, sender: str, receiver: str) -> bytes:
    """What ``sender`` has `sealed` for ``receiver``.

    Raises:
        MaskError: The message was changed, or sealed with another key or by another client.
    """
    try:
        return AESGCM(key).decrypt(_nonce(sender, receiver), message, None)
    except InvalidTag as error:
        raise MaskError(
            f"the shares from client {sender!r:.80} were changed on their way, or belong to "
            "another round"
        ) from error


def _nonce(sender: str, receiver: str) -> bytes:
    """One for each direction; a key is for the two messages of a pair in one round."""
    return int(sender > receiver).to_bytes(_NONCE_BYTES, "big")


@functools.lru_cache(maxsize=_NUM_REMEMBERED)
def is_signed(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the owner of an Ed25519 key has signed a message.

    The newest answers are kept: in one process, all clients of a cohort ask the same.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
