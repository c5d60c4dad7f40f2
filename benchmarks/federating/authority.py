"""Keys of a federation on one machine: a certificate authority, a server's certificate, node keys.

They are for loopback and last a few days. In production, use those of your organisation.
"""

import datetime
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pfm_llm.base.files import make_private_dir, write_bytes
from pfm_llm.node.masking import own_key

_LIFETIME = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Authority:
    """The files of a federation's keys.

    Attributes:
        folder: Only its owner can read it.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """The authority's certificate, which all nodes get."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The server's key."""
        return self.folder / "server.key"

    def private(self, node: str) -> Path:
        """The key with which a node authenticates itself."""
        return self.folder / node

    def public(self, node: str) -> Path:
        """The public key of a node, which the server's operator registers."""
        return self.folder / f"{node}.pub"


def masks_sections(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What each node's ``site.yaml`` says of masks; owners would exchange the keys in person.

    Args:
        folders: Name of each node to its private folder, where its key is made unless it is there.

    Returns:
        Node to its section ``masks``, with the keys of all others.
    """
    keys = {
        node: own_key(make_private_dir(folder)).public_key().public_bytes_raw().hex()
        for node, folder in folders.items()
    }
    return {
        node: {"name": node, "peers": {n: key for n, key in keys.items() if n != node}}
        for node in folders
    }


def make_authority(folder: Path, nodes: Sequence[str]) -> Authority:
    """Make all keys anew.

    Args:
        folder: Where they go.
        nodes: Names of the nodes.

    Raises:
        StorageError: They cannot be written.
    """
    files = Authority(make_private_dir(folder))
    own, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _name("a federation on one machine")
    root = _builder(issuer, issuer, own).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    leaf = _builder(_name("localhost"), issuer, server).add_extension(
        x509.SubjectAlternativeName(names), critical=False
    )
    for path, builder in ((files.root, root), (files.certificate, leaf)):
        signed = builder.sign(own, hashes.SHA256())
        write_bytes(path, signed.public_bytes(serialization.Encoding.PEM))
    write_bytes(files.key, _private(server, serialization.PrivateFormat.PKCS8))
    for node in nodes:
        key = ec.generate_private_key(ec.SECP384R1())
        write_bytes(files.private(node), _private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        write_bytes(files.public(node), public + b"\n")
    return files


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _LIFETIME)
    )


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
