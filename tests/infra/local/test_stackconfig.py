"""Configuration of the local stack: a mistake names knob, value and range."""

from pathlib import Path

import pytest

from infra.local.stackconfig import ROOT, StackConfig, StackConfigError

DSNS = {
    f"CORRAL_PG_DSN_{role}": f"postgresql://{role.lower()}@db/corral" for role in ("OWNER", "APP", "OPERATOR")
}


def test_nothing_set_means_embedded_servers_below_the_checkout() -> None:
    config = StackConfig.read({})
    assert (config.var, config.embedded_postgres, config.embedded_redis) == (ROOT / "var", True, True)
    assert (config.gateway_port, config.web_port, config.n_gateways, config.engine) == (8000, 8080, 2, "")


def test_urls_replace_the_embedded_servers() -> None:
    config = StackConfig.read(
        {**DSNS, "CORRAL_REDIS_URL": "rediss://u:p@cache:6379/0", "CORRAL_VAR": "/srv/corral"}
    )
    assert not config.embedded_postgres and not config.embedded_redis
    assert config.pg_dsns["app"] == "postgresql://app@db/corral"
    assert config.var == Path("/srv/corral")
    assert not StackConfig.read({"CORRAL_DATABASE_URL": "postgresql://admin:p@db/corral"}).embedded_postgres


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"CORRAL_GATEWAY_PORT": "http"}, "CORRAL_GATEWAY_PORT='http': set a whole number from 1 to 65535"),
        ({"CORRAL_WEB_PORT": "70000"}, "CORRAL_WEB_PORT='70000'"),
        ({"CORRAL_GATEWAYS": "0"}, "from 1 to 16"),
        ({"CORRAL_ENGINE": "llama"}, "CORRAL_ENGINE='llama': set vllm or toy"),
        (
            {"CORRAL_PG_DSN_APP": "postgresql://a@db/c"},
            "CORRAL_PG_DSN_OPERATOR, CORRAL_PG_DSN_OWNER: set all three",
        ),
        ({"CORRAL_DATABASE_URL": "mysql://root@db"}, "CORRAL_DATABASE_URL: set a postgresql:// URL"),
        ({"CORRAL_REDIS_URL": "localhost:6379"}, "CORRAL_REDIS_URL: set a redis:// URL"),
    ],
)
def test_mistake_is_named(environ: dict[str, str], words: str) -> None:
    with pytest.raises(StackConfigError, match=words):
        StackConfig.read(environ)


def test_secrets_stay_out_of_the_repr() -> None:
    environ = {
        "CORRAL_DATABASE_URL": "postgresql://admin:hush@db/corral",
        "CORRAL_REDIS_URL": "redis://u:hush@r/0",
    }
    assert "hush" not in repr(StackConfig.read(environ))
