"""Keys and certificates of one private session: its own authority, one server, one key for each SuperNode.

For the loopback addresses alone. `docs/flower_deployment.md` makes those of real hosts with openssl and ssh-keygen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID = timedelta(days=7)
_SKEW = timedelta(minutes=5)  # clocks of one machine agree, but not with what they said a moment ago


@final
@dataclass(frozen=True)
class Certificates:
    """Where the files are.

    Attributes:
      authority: certificate of the authority, which everybody is told to believe.
      server: the SuperLink's certificate for 127.0.0.1 and localhost,
      server_key: and its private key.
      nodes: a private key (OpenSSH, P-384) for each SuperNode; its public half has the name with `.pub` added.
    """

    authority: Path
    server: Path
    server_key: Path
    nodes: Sequence[Path]


def make_certificates(folder: Path, nodes: int) -> Certificates:
    """Writes fresh keys and certificates, valid for a week, that only this user may read.

    The authority's private key is never written: nothing more can be signed with it.

    Args:
      folder: made if it is not there.
      nodes: how many SuperNodes need a key.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Certificates(
        folder / "ca.crt",
        folder / "server.crt",
        folder / "server.key",
        [folder / f"supernode-{index}" for index in range(nodes)],
    )
    authority, server = _new_key(), _new_key()
    root = _certificate("privfm session authority", authority, None)
    _write(made.authority, root.public_bytes(serialization.Encoding.PEM))
    leaf = _certificate("127.0.0.1", server, (root, authority))
    _write(made.server, leaf.public_bytes(serialization.Encoding.PEM))
    _write(made.server_key, _private(server, serialization.PrivateFormat.PKCS8))
    for path in made.nodes:
        key = _new_key()
        _write(path, _private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write(path.with_name(f"{path.name}.pub"), public + b"\n")
    return made


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
) -> x509.Certificate:
    """The authority's own certificate without an `issuer`, a server's for this machine with one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, signing_key = (subject, key) if issuer is None else (issuer[0].subject, issuer[1])
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(_usage(signs=issuer is None), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(authority, critical=False)
    )
    if issuer is not None:
        here = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")])
        builder = builder.add_extension(here, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signing_key, hashes.SHA384())


def _usage(signs: bool) -> x509.KeyUsage:
    """An authority signs certificates and nothing else; a server proves that it holds its key."""
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
