"""A SAML identity provider: reads a real AuthnRequest, answers with an assertion that xmlsec signs."""

from __future__ import annotations

import base64
import datetime
import secrets
import zlib
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from lxml import etree
from onelogin.saml2.constants import OneLogin_Saml2_Constants as Constants
from onelogin.saml2.utils import OneLogin_Saml2_Utils as Utils

ENTITY_ID = "https://idp.example.org/metadata"
SSO_URL = "https://idp.example.org/sso"
EMAIL_FORMAT = "urn:oasis:names:tc:SAML:1.1:nameid-format:emailAddress"


def certificate(key: rsa.RSAPrivateKey) -> str:
    """Self-signed, PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "idp.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


@dataclass
class SamlIdp:
    """`overrides` changes what the next answer says; `signer` signs it."""

    key: rsa.RSAPrivateKey
    email: str = "bob@example.org"
    attributes: dict[str, list[str]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    is_signed: bool = True
    tamper: tuple[bytes, bytes] | None = None

    def __post_init__(self) -> None:
        self.certificate = certificate(self.key)
        self.signer = self.key

    def request_of(self, url: str) -> dict[str, str]:
        """What a redirect to us asks for."""
        packed = parse_qs(urlsplit(url).query)["SAMLRequest"][0]
        root = etree.fromstring(zlib.decompress(base64.b64decode(packed), -15))
        issuer = root.findtext("{urn:oasis:names:tc:SAML:2.0:assertion}Issuer")
        return {
            "in_response_to": root.get("ID"),
            "acs": root.get("AssertionConsumerServiceURL"),
            "audience": issuer,
        }

    def answer(self, request: dict[str, str]) -> str:
        """The SAMLResponse form field."""
        now = datetime.datetime.now(datetime.UTC)
        values: dict[str, Any] = {
            **request,
            "issuer": ENTITY_ID,
            "not_before": _at(now - datetime.timedelta(minutes=1)),
            "not_after": _at(now + datetime.timedelta(minutes=5)),
            "now": _at(now),
            "name_id": self.email,
            "name_format": EMAIL_FORMAT,
            "id": f"_{secrets.token_hex(16)}",
            "assertion_id": f"_{secrets.token_hex(16)}",
            **self.overrides,
        }
        statements = "".join(
            f'<saml:Attribute Name="{name}">'
            + "".join(f"<saml:AttributeValue>{value}</saml:AttributeValue>" for value in found)
            + "</saml:Attribute>"
            for name, found in self.attributes.items()
        )
        values["statements"] = (
            f"<saml:AttributeStatement>{statements}</saml:AttributeStatement>" if statements else ""
        )
        values["reply_to"] = f'InResponseTo="{values["in_response_to"]}"' if values["in_response_to"] else ""
        xml = _RESPONSE.format_map(values)
        if self.is_signed:
            pem = self.signer.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ).decode()
            root = etree.fromstring(xml)
            assertion = root.find("{urn:oasis:names:tc:SAML:2.0:assertion}Assertion")
            signed = Utils.add_sign(
                etree.tostring(assertion),
                pem,
                self.certificate,
                sign_algorithm=Constants.RSA_SHA256,
                digest_algorithm=Constants.SHA256,
            )
            root.replace(assertion, etree.fromstring(signed))
            xml = etree.tostring(root).decode()
        content = xml.encode()
        if self.tamper is not None:
            assert self.tamper[0] in content
            content = content.replace(*self.tamper)
        return base64.b64encode(content).decode()


def _at(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


_RESPONSE = """<samlp:Response xmlns:samlp="urn:oasis:names:tc:SAML:2.0:protocol" \
xmlns:saml="urn:oasis:names:tc:SAML:2.0:assertion" ID="{id}" Version="2.0" IssueInstant="{now}" \
Destination="{acs}" {reply_to}><saml:Issuer>{issuer}</saml:Issuer>\
<samlp:Status><samlp:StatusCode Value="urn:oasis:names:tc:SAML:2.0:status:Success"/></samlp:Status>\
<saml:Assertion ID="{assertion_id}" Version="2.0" IssueInstant="{now}"><saml:Issuer>{issuer}</saml:Issuer>\
<saml:Subject><saml:NameID Format="{name_format}">{name_id}</saml:NameID>\
<saml:SubjectConfirmation Method="urn:oasis:names:tc:SAML:2.0:cm:bearer">\
<saml:SubjectConfirmationData NotOnOrAfter="{not_after}" Recipient="{acs}" {reply_to}/>\
</saml:SubjectConfirmation></saml:Subject>\
<saml:Conditions NotBefore="{not_before}" NotOnOrAfter="{not_after}">\
<saml:AudienceRestriction><saml:Audience>{audience}</saml:Audience></saml:AudienceRestriction></saml:Conditions>\
<saml:AuthnStatement AuthnInstant="{now}" SessionIndex="{assertion_id}">\
<saml:AuthnContext><saml:AuthnContextClassRef>urn:oasis:names:tc:SAML:2.0:ac:classes:Password\
</saml:AuthnContextClassRef></saml:AuthnContext></saml:AuthnStatement>{statements}</saml:Assertion></samlp:Response>"""
