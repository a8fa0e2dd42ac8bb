"""The text of a key, `sk-crl-<12 lookup characters>-<43 secret characters>`, and its digest.

Keys of inference begin with `sk-crl`, tokens of the management API with `mt-crl`, those of directories with `sc-crl`,
so that none is taken for another, by people or by scanners of leaked secrets.

The lookup part finds the row by a unique index; the whole key is then compared through HMAC-SHA256 under a
pepper that only trusted processes hold. The secret has 256 random bits, so a fast keyed hash is the right
one: a slow password hash would buy nothing and cost the hot path milliseconds. Imports no Django: the gateway
uses it.

Keys that came from elsewhere (imports) have no lookup part of their own, and of them only the SHA-256 was known when
they came: their lookup part and their first digest are keyed hashes of that, so it is stored nowhere. At its first use
such a key gets the digest that every other has.
"""

import hashlib
import hmac
import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Final

LOOKUP_LENGTH = 12
SECRET_LENGTH = 43  # 32 random bytes in URL-safe base64
_ALPHABET = string.ascii_letters + string.digits
_FOREIGN: Final = re.compile(r"sk-[\x21-\x7e]{1,252}\Z")
INFERENCE: Final = "sk-crl"
MANAGEMENT: Final = "mt-crl"
SCIM: Final = "sc-crl"
_SHAPES: Final = {
    kind: re.compile(rf"{kind}-([0-9A-Za-z]{{{LOOKUP_LENGTH}}})-[0-9A-Za-z_-]{{{SECRET_LENGTH}}}\Z")
    for kind in (INFERENCE, MANAGEMENT, SCIM)
}


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the moment of its making; `plaintext` is shown once and stored nowhere."""

    plaintext: str = field(repr=False)
    lookup: str
    digest: bytes = field(repr=False)

    @property
    def last4(self) -> str:
        return self.plaintext[-4:]


def generate(pepper: bytes, kind: str = INFERENCE) -> NewKey:
    """A new random key (71 bits of lookup, 256 bits of secret) and its digest under `pepper`."""
    lookup = "".join(secrets.choice(_ALPHABET) for _ in range(LOOKUP_LENGTH))
    plaintext = f"{kind}-{lookup}-{secrets.token_urlsafe(32)}"
    return NewKey(plaintext=plaintext, lookup=lookup, digest=digest(pepper, plaintext))


@dataclass(frozen=True, slots=True)
class Peppers:
    """What digests are made under (`present`), and what else is accepted while that changes.

    What is kept under `previous` is moved to the present one at its use; what is kept under `upcoming` is left alone,
    because whoever finds it has still to learn that it is the present one by now.
    """

    present: bytes = field(repr=False)
    previous: bytes = field(default=b"", repr=False)
    upcoming: bytes = field(default=b"", repr=False)

    @property
    def accepted(self) -> tuple[bytes, ...]:
        return tuple(pepper for pepper in (self.present, self.previous, self.upcoming) if pepper)


def pepper_id(pepper: bytes) -> str:
    """Which pepper a digest was made under, without telling anything of it: kept beside the digest."""
    return hashlib.sha256(b"pepper id\0" + pepper).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Presented:
    """A key as a caller sent it: where its row would be found, and the digests that row may hold.

    `target`: lookup part, digest and pepper's id that it is kept under from now on, unless its digest `stays`.
    """

    lookup: str
    digests: tuple[bytes, ...] = field(repr=False)
    target: tuple[str, bytes, str] = field(repr=False)
    stays: frozenset[bytes] = field(repr=False)

    @property
    def identity(self) -> bytes:
        """Of this row of this key: what is asked once at a time."""
        return self.digests[-1]

    def is_behind(self, stored: bytes) -> bool:
        """Whether a row with this digest is its, in time that does not depend on where they differ."""
        found = False
        for candidate in self.digests:
            found |= hmac.compare_digest(candidate, stored)
        return found


def presented(peppers: bytes | Peppers, text: str) -> tuple[Presented, ...]:
    """What to look for on behalf of who sent `text`, in this order; nothing where it has the shape of no key at all.

    One row may be it; while the pepper changes, one for each pepper of a key that came from elsewhere.
    """
    if isinstance(peppers, bytes):
        peppers = Peppers(peppers)
    lookup = lookup_of(text) or lookup_of(text, MANAGEMENT) or lookup_of(text, SCIM)
    if lookup is None and not _FOREIGN.match(text):
        return ()
    own = {pepper: digest(pepper, text) for pepper in peppers.accepted}
    fresh, present = own[peppers.present], pepper_id(peppers.present)
    stays = {fresh, *([own[peppers.upcoming]] if peppers.upcoming else [])}
    if lookup is not None:
        return (Presented(lookup, tuple(own.values()), (lookup, fresh, present), frozenset(stays)),)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    target = (foreign_lookup(peppers.present, sha256), fresh, present)
    if peppers.upcoming:
        stays.add(foreign_digest(peppers.upcoming, sha256))
    return tuple(
        Presented(
            foreign_lookup(pepper, sha256),
            (*own.values(), foreign_digest(pepper, sha256)),
            target,
            frozenset(stays),
        )
        for pepper in peppers.accepted
    )


def foreign_lookup(pepper: bytes, sha256: str) -> str:
    """The lookup part of a key of which only the SHA-256 (64 hex digits) is known: 71 bits of a keyed hash of that."""
    number = int.from_bytes(digest(pepper, f"lookup of a foreign key {sha256}"))
    letters = []
    for _ in range(LOOKUP_LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)


def foreign_digest(pepper: bytes, sha256: str) -> bytes:
    """What is stored of such a key until it is used."""
    return digest(pepper, f"digest of a foreign key {sha256}")


def lookup_of(text: str, kind: str = INFERENCE) -> str | None:
    """The lookup part, or None where the text does not have the shape of a key (so no query is worth it)."""
    match = _SHAPES[kind].match(text)
    return match.group(1) if match else None


def digest(pepper: bytes, text: str) -> bytes:
    """HMAC-SHA256 of the whole key. Raises ValueError if the pepper is too short to protect anything."""
    if len(pepper) < 16:
        raise ValueError(
            "the key pepper must have at least 16 bytes: set CORRAL_KEY_PEPPER to 32 or more hex digits"
        )
    return hmac.digest(pepper, text.encode(), hashlib.sha256)


def matches(pepper: bytes, text: str, stored: bytes) -> bool:
    """Whether `text` is the key behind `stored`, in time that does not depend on where they differ."""
    return hmac.compare_digest(digest(pepper, text), stored)
