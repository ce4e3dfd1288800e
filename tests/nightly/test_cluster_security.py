"""Who may talk to a cluster: a token, and TLS between two nodes."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.images import jpeg
from tests.support.nodes import BIN, nodes

pytestmark = pytest.mark.slow

TOKEN = "t" * 40
SOON = 20.0


def certificates(folder: Path) -> dict[str, str]:
    """An authority, and a certificate of it for every address of this test; Ray's names for them."""
    now = datetime.datetime.now(datetime.UTC)
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "scalp test")])

    def signed(public, subject, extension):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=False)
            .sign(authority, hashes.SHA256())
        )

    addresses = [x509.IPAddress(ipaddress.ip_address(f"127.0.0.{number}")) for number in range(1, 6)]
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    files = {
        "RAY_TLS_CA_CERT": signed(
            authority.public_key(), name, x509.BasicConstraints(ca=True, path_length=None)
        ).public_bytes(serialization.Encoding.PEM),
        "RAY_TLS_SERVER_CERT": signed(
            own.public_key(),
            subject,
            x509.SubjectAlternativeName([*addresses, x509.DNSName("localhost")]),
        ).public_bytes(serialization.Encoding.PEM),
        "RAY_TLS_SERVER_KEY": own.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for variable, content in files.items():
        (folder / variable).write_bytes(content)
    return {variable: str(folder / variable) for variable in files} | {"RAY_USE_TLS": "1"}


def grade(bundle, source, out, environment: dict[str, str], seconds: float = 200) -> tuple[int, str]:
    command = [
        str(BIN / "scalp"),
        "grade",
        str(bundle),
        str(source),
        str(out),
        "--device",
        "cpu",
        "--heatmaps",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_two_nodes_with_tls_and_a_token_grade_and_let_nobody_else_in(bundle, tmp_path, s3):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(12):
        (photographs / f"{number}.jpg").write_bytes(jpeg(number))
    security = certificates(tmp_path) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with nodes(workers=1, **security) as cluster:
        known = cluster.environment | {"RAY_ADDRESS": cluster.address}
        code, printed = grade(bundle, photographs, tmp_path / "out", known)
        assert code == 0 and "12" in printed, printed

        for change, told in (
            ({"RAY_AUTH_TOKEN": "u" * 40}, "token"),
            ({"RAY_USE_TLS": "0"}, "RAY_USE_TLS"),
        ):
            started = time.monotonic()
            code, printed = grade(bundle, photographs, tmp_path / "no", known | change, SOON)
            assert code == 2 and told in printed, printed
            error, hint = printed.strip().splitlines()
            assert error.startswith("error: ") and hint.startswith("hint: ")
            assert time.monotonic() - started < SOON
