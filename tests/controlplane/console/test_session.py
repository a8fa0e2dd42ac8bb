"""Signing in and out, and how guessing is slowed down."""

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from controlplane.console import throttle
from controlplane.console.models import SignInFailures
from tests.world import PASSWORD, World


def attempt(client: Client, email: str = "alice@example.org", password: str = PASSWORD, **values: str):
    return client.post("/login", {"email": email, "password": password, **values})


def test_the_right_password_leads_to_the_page_asked_for(anonymous: Client, world: World) -> None:
    response = attempt(anonymous, next="/usage?days=30")
    assert (response.status_code, response.headers["Location"]) == (302, "/usage?days=30")
    assert anonymous.get("/").status_code == 200


def test_the_address_is_found_whatever_its_case(anonymous: Client, world: World) -> None:
    assert attempt(anonymous, email="  Alice@Example.ORG ").status_code == 302


@pytest.mark.parametrize("email", ["alice@example.org", "nobody@example.org"])
def test_wrong_password_and_unknown_user_look_the_same(anonymous: Client, world: World, email: str) -> None:
    response = attempt(anonymous, email=email, password="wrong-password")
    assert response.status_code == 401
    text = response.content.decode()
    assert "E-mail or password is wrong." in text
    assert "wrong-password" not in text


@pytest.mark.django_db
def test_what_is_missing_is_named_at_its_field(anonymous: Client) -> None:
    response = attempt(anonymous, email="no address", password="")
    assert response.status_code == 400
    text = response.content.decode()
    assert "Enter a valid email address." in text
    assert "This field is required." in text
    assert 'aria-invalid="true"' in text


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "javascript:alert(1)", "\\\\evil"]
)
def test_nobody_is_sent_to_another_site(anonymous: Client, world: World, target: str) -> None:
    assert attempt(anonymous, next=target).headers["Location"] == "/"


def test_signing_out_ends_the_session(owner: Client) -> None:
    assert owner.post("/logout").headers["Location"] == "/login"
    assert owner.get("/").status_code == 302


def test_a_signed_in_visitor_skips_the_form(owner: Client) -> None:
    assert owner.get("/login").status_code == 302


def test_after_too_many_failures_even_the_right_password_waits(anonymous: Client, world: World) -> None:
    for _ in range(throttle.MAX_PER_EMAIL):
        assert attempt(anonymous, password="guess").status_code == 401
    response = attempt(anonymous)
    assert response.status_code == 429
    assert "Try again in 15 minutes" in response.content.decode()
    # Others at the same address, and the same user elsewhere, are not locked out.
    assert attempt(Client(), email="bob@example.org").status_code == 302
    assert attempt(Client(REMOTE_ADDR="10.1.2.3")).status_code == 302


def test_the_wait_ends_with_the_window(anonymous: Client, world: World) -> None:
    for _ in range(throttle.MAX_PER_EMAIL):
        attempt(anonymous, password="guess")
    SignInFailures.objects.update(since=timezone.now() - throttle.WINDOW - timedelta(seconds=1))
    assert attempt(anonymous).status_code == 302


def test_success_forgets_the_failures_of_that_pair(anonymous: Client, world: World) -> None:
    for _ in range(throttle.MAX_PER_EMAIL - 1):
        attempt(anonymous, password="guess")
    attempt(anonymous)
    other = Client()
    for _ in range(throttle.MAX_PER_EMAIL - 1):
        assert attempt(other, password="guess").status_code == 401
    assert attempt(other).status_code == 302


@pytest.mark.django_db
def test_one_address_cannot_try_many_users() -> None:
    now = timezone.now()
    for number in range(throttle.MAX_PER_ADDRESS):
        throttle.count_failure(email=f"{number}@example.org", address="10.0.0.1", now=now)
    assert throttle.wait_s(email="fresh@example.org", address="10.0.0.1", now=now) > 0
    assert throttle.wait_s(email="fresh@example.org", address="10.0.0.2", now=now) == 0


@pytest.mark.django_db
def test_old_failures_are_forgotten_and_removed() -> None:
    now = timezone.now()
    throttle.count_failure(email="a@example.org", address="10.0.0.1", now=now - throttle.WINDOW * 2)
    throttle.count_failure(email="b@example.org", address="10.0.0.2", now=now)
    assert SignInFailures.objects.count() == 2  # one pair and one address


@pytest.mark.django_db
def test_a_new_window_counts_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "_PRUNE_ROWS", 0)  # others' old rows come first
    now = timezone.now()
    for _ in range(throttle.MAX_PER_EMAIL):
        throttle.count_failure(email="a@example.org", address="10.0.0.1", now=now - throttle.WINDOW * 2)
    throttle.count_failure(email="a@example.org", address="10.0.0.1", now=now)
    assert throttle.wait_s(email="a@example.org", address="10.0.0.1", now=now) == 0
