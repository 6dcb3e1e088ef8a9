"""A key and certificate for one job's connections between nodes: who shows them belongs to the job."""

from __future__ import annotations

import datetime


def make_pem() -> str:
    """Return a fresh key and certificate, which only the nodes of this job get, whatever their clocks say."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lanspeed")])
    dates = [datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (1970, 2100)]
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(dates[0]).not_valid_after(dates[1])
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256()))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                serialization.NoEncryption())
    return (private + certificate.public_bytes(serialization.Encoding.PEM)).decode()
