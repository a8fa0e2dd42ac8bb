"""Configuration from the environment: defaults, ranges, messages."""

from dataclasses import fields
from pathlib import Path

import pytest

from controlplane.gateway.config import ConfigError, GatewayConfig

MINIMAL = {
    "CORRAL_REDIS_URL": "redis://corral:secret@127.0.0.1:1/0",
    "CORRAL_PG_DSN_APP": "postgresql://corral_app:secret@127.0.0.1:1/corral",
    "CORRAL_KEY_PEPPER": "ab" * 16,
}


def test_defaults_hold_when_nothing_else_is_set() -> None:
    config = GatewayConfig.from_env(MINIMAL)
    reference = GatewayConfig("", "", b"")
    given = {"redis_url", "pg_dsn", "key_pepper", "name"}
    for field in fields(GatewayConfig):
        if field.name not in given:
            assert getattr(config, field.name) == getattr(reference, field.name), field.name
    assert config.key_pepper == b"\xab" * 16


def test_console_is_an_allowed_origin_and_a_list_replaces_it() -> None:
    console = {"CORRAL_CONSOLE_URL": "http://127.0.0.1:8401/"}
    assert GatewayConfig.from_env(MINIMAL | console).cors_origins == ("http://127.0.0.1:8401",)
    listed = {"CORRAL_GATEWAY_CORS_ORIGINS": "https://a.test, https://b.test/"}
    assert GatewayConfig.from_env(MINIMAL | console | listed).cors_origins == (
        "https://a.test",
        "https://b.test",
    )


def test_missing_variables_are_listed_together() -> None:
    with pytest.raises(ConfigError, match="CORRAL_REDIS_URL, CORRAL_PG_DSN_APP, CORRAL_KEY_PEPPER"):
        GatewayConfig.from_env({})


@pytest.mark.parametrize("value", ["0", "-1", "x", "nan", "inf", "65536", ""])
def test_value_out_of_range_names_knob_value_and_range(value: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"CORRAL_GATEWAY_PORT='{value}': must be a number from 1 to 65535"
    ):
        GatewayConfig.from_env(MINIMAL | {"CORRAL_GATEWAY_PORT": value})


@pytest.mark.parametrize("pepper", ["zz", "ab", "ab" * 15])
def test_short_or_broken_pepper_is_refused_without_showing_it(pepper: str) -> None:
    with pytest.raises(ConfigError) as error:
        GatewayConfig.from_env(MINIMAL | {"CORRAL_KEY_PEPPER": pepper})
    assert pepper not in str(error.value).replace("CORRAL_KEY_PEPPER", "")


def test_secrets_do_not_show() -> None:
    assert "secret" not in repr(GatewayConfig.from_env(MINIMAL))


def test_a_length_model_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json.gz"
    path.write_text("no")
    with pytest.raises(
        ConfigError, match=r"CORRAL_GATEWAY_LENGTH_MODEL: lengths\.json\.gz: not a length model"
    ):
        GatewayConfig.from_env(MINIMAL | {"CORRAL_GATEWAY_LENGTH_MODEL": str(path)})
