"""The text of an API key and its digest."""

import pytest

from controlplane.tenants import api_keys

PEPPER = bytes(range(32))


def test_a_new_key_has_the_shape_and_matches_its_digest() -> None:
    new = api_keys.generate(PEPPER)
    prefix, brand, lookup, _ = new.plaintext.split("-", 3)
    assert (prefix, brand) == ("sk", "crl")
    assert lookup == new.lookup == api_keys.lookup_of(new.plaintext)
    assert len(new.plaintext) == len("sk-crl-") + 12 + 1 + 43
    assert api_keys.matches(PEPPER, new.plaintext, new.digest)


def test_any_changed_character_no_longer_matches() -> None:
    new = api_keys.generate(PEPPER)
    for i in range(len(new.plaintext)):
        changed = new.plaintext[:i] + ("A" if new.plaintext[i] != "A" else "B") + new.plaintext[i + 1 :]
        assert not api_keys.matches(PEPPER, changed, new.digest)


def test_another_pepper_does_not_match() -> None:
    new = api_keys.generate(PEPPER)
    assert not api_keys.matches(b"another pepper of 32 bytes......", new.plaintext, new.digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sk-crl-",
        "sk-abc",
        "sk-crl-" + "a" * 12 + "-" + "b" * 42,
        "sk-crl-" + "a" * 12 + "-" + "b" * 43 + "\n",
    ],
)
def test_what_is_no_key_has_no_lookup(text: str) -> None:
    assert api_keys.lookup_of(text) is None


def test_a_missing_pepper_is_an_error_that_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="CORRAL_KEY_PEPPER"):
        api_keys.generate(b"")


def test_neither_plaintext_nor_digest_is_in_the_representation() -> None:
    new = api_keys.generate(PEPPER)
    assert new.plaintext not in repr(new) and repr(new.digest) not in repr(new)
