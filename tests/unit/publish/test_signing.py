"""Keys and signatures: what is signed is verified, and nothing else is."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pfm_llm.base.errors import ArtefactError, DiskSpaceError, StorageError
from pfm_llm.publish import signing

CONTENT = b'{"format": 2}\n'


@pytest.fixture
def key(tmp_path: Path) -> signing.SigningKey:
    """A fresh key."""
    signing.new_key(tmp_path / "fresh.pem")
    return signing.load_key(tmp_path / "fresh.pem")


def pem(
    key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes = b""
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    )


def write_key(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_new_key_is_its_owners_alone_and_signs(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "publisher.pem"
    public = signing.new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(public) == 44
    signature = signing.sign(CONTENT, signing.load_key(path))
    assert signing.verify(CONTENT, signature, None) == public
    assert signing.verify(CONTENT, signature, public) == public
    assert public != signing.new_key(tmp_path / "other.pem")


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "publisher.pem"
    signing.new_key(path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"publisher\.pem exists.*another file"):
        signing.new_key(path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskSpaceError):
        signing.new_key(tmp_path / "publisher.pem")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_reach_is_refused(mode: int, tmp_path: Path) -> None:
    signing.new_key(tmp_path / "a.pem")
    (tmp_path / "a.pem").chmod(mode)
    with pytest.raises(StorageError, match=f"mode {mode:04o}.*chmod 600"):
        signing.load_key(tmp_path / "a.pem")


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    ed, other = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(StorageError, match=r"No such file.*keygen"):
        signing.load_key(tmp_path / "absent.pem")
    for name, content, message in [
        ("text", b"hello", "no private key in PEM"),
        ("half", pem(ed)[:60], "no private key in PEM"),
        ("locked", pem(ed, b"secret"), "has a password"),
        ("curve", pem(other), "not an Ed25519 key"),
    ]:
        with pytest.raises(StorageError, match=message):
            signing.load_key(write_key(tmp_path / name, content))
    assert isinstance(signing.load_key(write_key(tmp_path / "good", pem(ed))), signing.SigningKey)


def test_signing_again_gives_the_same_bytes(key: signing.SigningKey) -> None:
    signature = signing.sign(CONTENT, key)
    assert signature == signing.sign(CONTENT, key)
    assert set(json.loads(signature)) == {"algorithm", "public_key", "signature"}


@pytest.mark.parametrize("place", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_a_changed_byte_of_the_content_is_found(place: int, key: signing.SigningKey) -> None:
    changed = bytearray(CONTENT)
    changed[place] ^= 1
    with pytest.raises(ArtefactError, match="not of this manifest"):
        signing.verify(bytes(changed), signing.sign(CONTENT, key), None)


def test_another_key_is_not_trusted(key: signing.SigningKey, tmp_path: Path) -> None:
    trusted = signing.new_key(tmp_path / "trusted.pem")
    signature = signing.sign(CONTENT, key)
    with pytest.raises(ArtefactError, match="not with the trusted") as caught:
        signing.verify(CONTENT, signature, trusted)
    assert signing.public_key(key) in str(caught.value)
    # Naming the trusted key in the file does not help.
    forged = json.loads(signature) | {"public_key": trusted}
    with pytest.raises(ArtefactError, match="not of this manifest"):
        signing.verify(CONTENT, json.dumps(forged).encode(), trusted)


@pytest.mark.parametrize("trusted", ["", "no key", base64.b64encode(b"short").decode()])
def test_a_trusted_key_that_is_none_is_told(trusted: str, key: signing.SigningKey) -> None:
    with pytest.raises(ArtefactError, match="is not base64 of 32 bytes"):
        signing.verify(CONTENT, signing.sign(CONTENT, key), trusted)


def test_damaged_signature_files_are_refused(key: signing.SigningKey) -> None:
    whole = json.loads(signing.sign(CONTENT, key))
    for content in (
        b"",
        b"[]",
        b"\xff",
        json.dumps({**whole, "algorithm": "none"}).encode(),
        json.dumps({**whole, "more": 1}).encode(),
        json.dumps({**whole, "signature": 7}).encode(),
        json.dumps({**whole, "signature": whole["signature"][:-4]}).encode(),
        json.dumps({**whole, "public_key": "ä" * 44}).encode(),
        json.dumps({k: v for k, v in whole.items() if k != "signature"}).encode(),
    ):
        with pytest.raises(ArtefactError):
            signing.verify(CONTENT, content, None)


def test_keys_are_compared_by_their_bytes(key: signing.SigningKey) -> None:
    public = signing.public_key(key)
    assert signing.same_key(public, public)
    assert not signing.same_key(public, None)
    assert not signing.same_key(None, None)
