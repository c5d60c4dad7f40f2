"""Signatures of a published manifest: Ed25519 keys, and the ``.sig`` file beside a manifest.

A signature shows the publisher; it says nothing about the quality or the privacy of an adapter. The
file contains its public key, so that anybody can check that the signed manifest is unchanged. Only
a reader who knows the publisher's key can check whose key it is; that key is called "trusted".
"""

import base64
import binascii
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, StorageError

SigningKey = Ed25519PrivateKey

_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
_PRIVATE_MODE = 0o600
_OF_OTHERS = 0o077
_HOW_TO_GET_A_KEY = "make a key with `pfm versions keygen PATH`"


def new_key(path: Path) -> str:
    """Make a private key that its owner alone can read.

    Args:
        path: The PEM file to write.

    Returns:
        The public key, base64 (44 characters): what readers are told to trust.

    Raises:
        StorageError: The file exists and is not replaced, or it cannot be written.
    """
    key = SigningKey.generate()
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with files.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(_PRIVATE_MODE, exist_ok=False)
        except FileExistsError:
            raise StorageError(
                f"{path} exists, and a key is never replaced: name another file, or delete it "
                "if nothing was signed with it"
            ) from None
    try:
        files.write_bytes(path, content)  # it replaces, so the empty file above holds the place
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return public_key(key)


def load_key(path: Path) -> SigningKey:
    """Read a private key.

    Args:
        path: A PEM file, as `new_key` writes it.

    Raises:
        StorageError: It is missing, readable by others, or no Ed25519 key without a password.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read the signing key {path}: {error.strerror or error}; {_HOW_TO_GET_A_KEY}"
        ) from error
    if mode & _OF_OTHERS:
        raise StorageError(
            f"the signing key {path} can be read or written by others (mode {mode & 0o777:04o}): "
            f"run `chmod 600 {path}`, or make a new key if others may have read it"
        )
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError as error:
        raise StorageError(
            f"the signing key {path} has a password: save it without one, or {_HOW_TO_GET_A_KEY}"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise StorageError(f"{path} is no private key in PEM; {_HOW_TO_GET_A_KEY}") from error
    if not isinstance(key, SigningKey):
        raise StorageError(f"the signing key {path} is not an Ed25519 key; {_HOW_TO_GET_A_KEY}")
    return key


def public_key(key: SigningKey) -> str:
    """The public key that belongs to a private one, base64 (44 characters)."""
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return base64.b64encode(key.public_key().public_bytes(*raw)).decode()


def sign(content: bytes, key: SigningKey) -> bytes:
    """Sign the bytes of a manifest.

    Args:
        content: The file that is signed.
        key: From `load_key`.

    Returns:
        The content of the ``.sig`` file: equal content and key give equal bytes.
    """
    signature = base64.b64encode(key.sign(content)).decode()
    file = _SignatureFile(algorithm="ed25519", public_key=public_key(key), signature=signature)
    return (file.model_dump_json(indent=2) + "\n").encode()


def verify(content: bytes, signature_file: bytes, trusted: str | None) -> str:
    """Check a signature.

    Args:
        content: The file that was signed.
        signature_file: What `sign` returned for it.
        trusted: The only public key to accept, base64; None accepts any.

    Returns:
        The public key that the content was signed with.

    Raises:
        ArtefactError: The signature is not of this content, not by the trusted key, or no
            signature at all; or the trusted key is no key.
    """
    if trusted is not None:
        check_public_key(trusted)
    try:
        file = _SignatureFile.model_validate_json(signature_file)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "its start"
        raise ArtefactError(
            f"the signature file is damaged at {where}, or from another version of pfm_llm: "
            f"{error.errors()[0]['msg']}"
        ) from error
    key = _decoded(file.public_key, _KEY_BYTES, "the signature's public key")
    signature = _decoded(file.signature, _SIGNATURE_BYTES, "the signature")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
    except InvalidSignature as error:
        raise ArtefactError(
            "the signature is not of this manifest: one of the two was changed after signing; "
            "do not trust it, pull another version or ask its publisher"
        ) from error
    found = base64.b64encode(key).decode()
    if trusted is not None and not same_key(found, trusted):
        raise ArtefactError(
            f"the manifest is signed with the key {found}, not with the trusted {trusted}: "
            "do not trust it, or ask its publisher whether the key is new"
        )
    return found


def check_public_key(text: str) -> None:
    """Check that this could be a public key.

    Raises:
        ArtefactError: It is not base64 of 32 bytes.
    """
    _decoded(text, _KEY_BYTES, f"the key {text!r}")


def same_key(one: str | None, other: str | None) -> bool:
    """Whether two public keys are the same; None equals no key."""
    if one is None or other is None:
        return False
    return base64.b64decode(one) == base64.b64decode(other)


class _SignatureFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    algorithm: Literal["ed25519"]
    public_key: str
    signature: str


def _decoded(text: str, size: int, what: str) -> bytes:
    """The bytes behind base64 of a known length."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if len(content) != size:
        raise ArtefactError(f"{what} is not base64 of {size} bytes")
    return content
