"""The environment is checked where it is read, and the message names variable and remedy."""

import pytest
from django.core.exceptions import ImproperlyConfigured

from controlplane.settings import Environment, database, email_settings


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CORRAL_DB_ROLE": "root"}, "CORRAL_DB_ROLE='root': set one of app, operator, owner"),
        ({"CORRAL_KEY_PEPPER": "zz"}, "CORRAL_KEY_PEPPER"),
        ({"CORRAL_PG_POOL_SIZE": "0"}, "CORRAL_PG_POOL_SIZE='0': set a whole number from 2 to 200"),
        ({"CORRAL_PG_POOL_SIZE": "many"}, "CORRAL_PG_POOL_SIZE='many'"),
    ],
)
def test_a_bad_value_is_refused_at_start(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ImproperlyConfigured) as refused:
        Environment.read(environ)
    assert message in str(refused.value)


def test_a_serving_process_lists_everything_it_lacks_at_once() -> None:
    with pytest.raises(ImproperlyConfigured) as refused:
        Environment.read({"CORRAL_DB_ROLE": "operator"}).require()
    for name in ("CORRAL_REDIS_URL", "CORRAL_PG_DSN_OPERATOR", "CORRAL_SECRET_KEY", "CORRAL_KEY_PEPPER"):
        assert name in str(refused.value)


def test_secrets_are_not_in_the_representation() -> None:
    env = Environment.read(
        {
            "CORRAL_SECRET_KEY": "s3cret",
            "CORRAL_PG_DSN_APP": "postgresql://u:pa55@h/d",
            "CORRAL_REDIS_URL": "redis://:w0rd@h",
            "CORRAL_KEY_PEPPER": "abad1dea" * 4,
        }
    )
    shown = repr(env)
    assert not any(secret in shown for secret in ("s3cret", "pa55", "w0rd", "abad1dea", str(env.key_pepper)))


def test_a_dsn_becomes_a_bounded_connection() -> None:
    settings = database(
        "postgresql://corral_app:p%40ss@db.internal:6432/corral?sslmode=require",
        statement_timeout_s=10,
        pool_size=8,
    )
    assert (settings["USER"], settings["PASSWORD"], settings["HOST"]) == ("corral_app", "p@ss", "db.internal")
    assert (settings["PORT"], settings["NAME"]) == ("6432", "corral")
    options = settings["OPTIONS"]
    assert options["sslmode"] == "require"
    assert options["connect_timeout"] == 3
    assert "statement_timeout=10000" in options["options"]
    assert options["pool"]["max_size"] == 8
    assert options["pool"]["max_waiting"] > 0


def test_mail_goes_where_the_url_says(tmp_path) -> None:
    assert email_settings("", var=tmp_path)["EMAIL_FILE_PATH"] == str(tmp_path / "mail")
    smtp = email_settings("smtp://us%40er:p%2Fw@mx.example.org", var=tmp_path)
    assert (smtp["EMAIL_HOST"], smtp["EMAIL_PORT"], smtp["EMAIL_HOST_USER"]) == (
        "mx.example.org",
        587,
        "us@er",
    )
    assert (smtp["EMAIL_HOST_PASSWORD"], smtp["EMAIL_USE_TLS"], smtp["EMAIL_USE_SSL"]) == ("p/w", True, False)
    assert email_settings("smtps://mx.example.org", var=tmp_path)["EMAIL_USE_SSL"] is True
    for wrong in ("mx.example.org:25", "http://mx.example.org", "smtp://"):
        with pytest.raises(ImproperlyConfigured, match=r"smtp://user:password@host:587"):
            email_settings(wrong, var=tmp_path)
