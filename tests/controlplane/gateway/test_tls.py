"""A gateway that speaks TLS takes a new certificate while streams run."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controlplane.gateway.config import ConfigError, GatewayConfig
from controlplane.gateway.tls import Certificate
from infra.local import tls
from tests.controlplane.gateway.harness import CHAT, Job, Machine, running


def make_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = directory / f"{name}.pem", directory / f"{name}.key"
    cert_path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_path, key_path


async def test_a_stream_goes_on_while_the_certificate_changes(redis_url: str, tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "first")
    new_cert, new_key = make_pair(tmp_path, "second")
    other_cert, _ = make_pair(tmp_path, "third")
    go_on = asyncio.Event()

    async def slow(job: Job) -> None:
        await job.emit("before ")
        await go_on.wait()
        await job.emit("after")
        await job.finish()

    async with running(redis_url, tls_cert=str(cert), tls_key=str(key)) as gw:
        context = gw.server.config.ssl
        assert context is not None
        certificate = Certificate(context, cert, key, look_s=0.05)
        certificate.start()
        machine = Machine(redis_url)
        machine.behaviour = slow
        await machine.start()
        try:
            first = tls.fingerprint(cert.read_text())
            assert await asyncio.to_thread(tls.served, gw.url) == first
            async with gw.http.stream(
                "POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=gw.auth()
            ) as response:
                chunks = response.aiter_text()
                text = await anext(chunks)
                with pytest.raises(ValueError, match="no certificate with its key"):
                    tls.replace_pair(other_cert, new_key, over_cert=cert, over_key=key, url=gw.url)
                served = await asyncio.to_thread(
                    tls.replace_pair, new_cert, new_key, over_cert=cert, over_key=key, url=gw.url
                )
                assert served == tls.fingerprint(new_cert.read_text()) != first
                assert certificate.n_loaded == 1
                go_on.set()
                text += "".join([chunk async for chunk in chunks])
            assert "before " in text
            assert "after" in text
            assert "[DONE]" in text
            cert.write_bytes(other_cert.read_bytes())  # a pair that does not fit
            assert not certificate.look()
            assert await asyncio.to_thread(tls.served, gw.url) == served
        finally:
            await certificate.close()
            await machine.stop()


def test_the_pair_is_checked_at_start(tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "first")
    _, other = make_pair(tmp_path, "second")
    env = {
        "CORRAL_REDIS_URL": "redis://x",
        "CORRAL_PG_DSN_APP": "postgresql://x",
        "CORRAL_KEY_PEPPER": "ab" * 16,
        "CORRAL_GATEWAY_TLS_CERT": str(cert),
    }
    with pytest.raises(ConfigError, match="set both, or none"):
        GatewayConfig.from_env(env)
    with pytest.raises(ConfigError, match="CORRAL_GATEWAY_TLS_KEY"):
        GatewayConfig.from_env({**env, "CORRAL_GATEWAY_TLS_KEY": str(other)})
    assert GatewayConfig.from_env({**env, "CORRAL_GATEWAY_TLS_KEY": str(key)}).tls_key == str(key)
