"""Certificates of a made-up CA, as files."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shardlift.proto.v1.tls import STAGE_NAME, TLS

_DAY = datetime.timedelta(days=1)


class Authority:
    """A CA in `folder`, and the certificates that it gives out."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"shardlift test {name}")])
        certificate = self._builder(self._name, self._key, days=10)
        certificate = certificate.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.file = self._write(f"{name}.crt", _pem(certificate.sign(self._key, hashes.SHA256())))

    def key_file(self) -> str:
        """Its own key, for whoever signs in its place."""
        return self._write(f"{Path(self.file).stem}.key", _private_pem(self._key))

    def issue(
        self,
        name: str,
        *,
        hosts: Sequence[str] = ("localhost", "127.0.0.1"),
        days: float = 5,
        tls_name: str | None = None,
    ) -> TLS:
        """A certificate with its key, as files called after `name`, that are replaced if they are there. It is made
        out to `hosts`, and expires in `days`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternatives = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
        certificate = (
            self._builder(subject, key, days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(alternatives, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return TLS(
            ca=self.file,
            cert=self._write(f"{name}.crt", _pem(certificate)),
            key=self._write(f"{name}.key", _private_pem(key)),
            name=tls_name,
        )

    def stages(self, name: str = "stage", **options: float) -> TLS:
        """What stages of one model share, here where they share a machine."""
        return self.issue(name, hosts=[STAGE_NAME], tls_name=STAGE_NAME, **options)  # type: ignore[arg-type]

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: float) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 20 * _DAY)
            .not_valid_after(now + days * _DAY)
        )

    def _write(self, name: str, data: bytes) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{name}"
        draft.write_bytes(data)
        draft.chmod(0o600)
        os.replace(draft, self.folder / name)
        return str(self.folder / name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
