"""Which process of the stack is told what: an environment per process, with no secret it does not need.

Called by stack.py for the processes it starts, and by manage.py for commands run by hand against a stack
that was started from the same data directory (var/environment.json, mode 600).
"""

import secrets
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg

from infra.local import roles
from infra.local.privatefile import read_json, write_private_json
from infra.local.stackconfig import ROOT, StackConfig

SAVED = "environment.json"
_SECRETS = (
    "CORRAL_DATABASE_URL",
    "CORRAL_PG_DSN_OWNER",
    "CORRAL_PG_DSN_APP",
    "CORRAL_PG_DSN_OPERATOR",
    "CORRAL_REDIS_URL",
    "CORRAL_SECRET_KEY",
    "CORRAL_SECRET_KEY_PREVIOUS",
    "CORRAL_KEY_PEPPER",
    "CORRAL_KEY_PEPPER_PREVIOUS",
    "CORRAL_KEY_PEPPER_NEXT",
    "CORRAL_DIGEST_SECRET",
)
# Of a process, and of the shell that started the stack: with passwords, or about no stack at all.
_OWN = (
    "CORRAL_DB_ROLE",
    "CORRAL_LOG_LEVEL",
    "CORRAL_EMAIL_URL",
    "CORRAL_API_KEY",
    "CORRAL_API_TOKEN",
    "CORRAL_API_URL",
)
_COMMON = (
    "CORRAL_REDIS_URL",
    "CORRAL_PG_DSN_APP",
    "CORRAL_KEY_PEPPER",
    "CORRAL_KEY_PEPPER_PREVIOUS",
    "CORRAL_KEY_PEPPER_NEXT",
    "CORRAL_DIGEST_SECRET",
)
_DJANGO = (*_COMMON, "CORRAL_PG_DSN_OPERATOR", "CORRAL_SECRET_KEY", "CORRAL_SECRET_KEY_PREVIOUS")
# Who gets which secrets, and which role its `default` connection has. The owner's DSN is for migrations only.
PROCESSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gateway": ("app", _COMMON),
    "web": ("app", _DJANGO),
    "control": ("operator", _DJANGO),
    "beat": ("operator", _DJANGO),
    "quickstart": ("operator", _DJANGO),
    "migrate": ("owner", (*_DJANGO, "CORRAL_PG_DSN_OWNER")),
}
_STACK_COMMANDS = ("up", "down", "status", "logs")  # they make that environment, or need none
_OWNER_COMMANDS = ("migrate", "makemigrations", "sqlmigrate", "showmigrations", "dbshell")


def stack_environment(
    config: StackConfig, *, ports: Mapping[str, int], engine: str, pg_dsns: Mapping[str, str], redis_url: str
) -> dict[str, str]:
    """Everything CORRAL_ there is to say, secrets included; `process_environment` takes from it."""
    return {
        "CORRAL_VAR": str(config.var),
        "CORRAL_CELL": config.cell,
        "CORRAL_ENGINE": engine,
        "CORRAL_GATEWAY_PORT": str(ports["gateway"]),
        "CORRAL_WEB_PORT": str(ports["web"]),
        "CORRAL_CONTROL_METRICS_PORT": str(ports["control_metrics"]),
        "CORRAL_GATEWAY_URL": f"http://127.0.0.1:{ports['gateway']}",
        "CORRAL_CONSOLE_URL": f"http://127.0.0.1:{ports['web']}",
        # The playground's page calls the gateway; to a browser `localhost` is another origin.
        "CORRAL_GATEWAY_CORS_ORIGINS": ",".join(
            f"http://{host}:{ports['web']}" for host in ("127.0.0.1", "localhost")
        ),
        "CORRAL_REDIS_URL": redis_url,
        "CORRAL_PG_DSN_OWNER": pg_dsns["owner"],
        "CORRAL_PG_DSN_APP": pg_dsns["app"],
        "CORRAL_PG_DSN_OPERATOR": pg_dsns["operator"],
        "CORRAL_PG_POOLER": config.pg_pooler,
        **secret_variables(config.var),
    }


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """What the stack's processes inherit of ours (CORRAL_MAX_MACHINES, CORRAL_PROVIDER, …): a command run by hand from
    another shell must go by the same. No secret, and nothing that is each process's or the shell's own.
    """
    left_out = (*_SECRETS, *_OWN)
    return {
        name: value for name, value in environ.items() if name.startswith("CORRAL_") and name not in left_out
    }


def secret_variables(var: Path) -> dict[str, str]:
    """What is in secrets.json, as processes are told it; empty where a secret is not being changed."""
    kept = stack_secrets(var)
    return {
        "CORRAL_SECRET_KEY": kept["secret_key"],
        "CORRAL_SECRET_KEY_PREVIOUS": kept.get("secret_key_previous", ""),
        "CORRAL_KEY_PEPPER": kept["key_pepper"],
        "CORRAL_KEY_PEPPER_PREVIOUS": kept.get("key_pepper_previous", ""),
        "CORRAL_KEY_PEPPER_NEXT": kept.get("key_pepper_next", ""),
        # Stacks from before it was apart: it stays what the pepper was then.
        "CORRAL_DIGEST_SECRET": kept.get("digest_secret", kept["key_pepper"]),
    }


def process_environment(kind: str, stack: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of one process: ours without our secrets, the stack's facts, and its own secrets only."""
    role, allowed = PROCESSES[kind]
    env = {name: value for name, value in inherited.items() if name not in _SECRETS}
    env |= {name: value for name, value in stack.items() if name not in _SECRETS or name in allowed}
    env |= {"CORRAL_DB_ROLE": role, "PYTHONUNBUFFERED": "1"}
    return env


def stack_secrets(var: Path) -> dict[str, str]:
    """Secret key and key pepper, made up on first use. A lost pepper makes all API keys worthless."""
    path = var / "secrets.json"
    stored = read_json(path)
    if stored is None:
        stored = {
            "secret_key": secrets.token_urlsafe(48),
            "key_pepper": secrets.token_hex(32),
            "digest_secret": secrets.token_hex(32),
        }
        write_private_json(path, stored)
    return dict(stored)


def external_dsns(config: StackConfig) -> dict[str, str]:
    """DSN per role on an external server. With an administrator's URL roles and database are made there.

    Raises RuntimeError when that server cannot be reached or refuses.
    """
    if config.pg_dsns:
        return dict(config.pg_dsns)
    path = config.var / "postgres-roles.json"
    passwords = read_json(path)
    if passwords is None:
        passwords = {role: secrets.token_urlsafe(24) for role in roles.ROLES}
        write_private_json(path, passwords)
    parts = urlsplit(config.database_url)
    database = parts.path.lstrip("/") or roles.DATABASE
    address = parts.netloc.rpartition("@")[2]
    try:
        administration = urlunsplit(parts._replace(path="/postgres"))
        with psycopg.connect(administration, autocommit=True, connect_timeout=5) as superuser:
            roles.ensure_roles(superuser, passwords, owner_creates_databases=False)
            roles.ensure_database(superuser, database)
        with psycopg.connect(
            urlunsplit(parts._replace(path=f"/{database}")), autocommit=True, connect_timeout=5
        ) as inside:
            roles.ensure_schema(inside)
    except psycopg.Error as error:
        raise RuntimeError(f"CORRAL_DATABASE_URL ({address}): {error}") from error
    query = f"?{parts.query}" if parts.query else ""
    logins = {role: roles.login_of(role, passwords) for role in roles.ROLES}
    return {
        role.removeprefix("corral_"): f"postgresql://{login}:{passwords[login]}@{address}/{database}{query}"
        for role, login in logins.items()
    }


def save(var: Path, stack: Mapping[str, str]) -> None:
    """Keep the stack's environment for commands run by hand."""
    write_private_json(var / SAVED, dict(stack))


def load(var: Path) -> dict[str, str]:
    """What `save` kept; empty when no stack was ever started from this data directory."""
    return dict(read_json(var / SAVED) or {})


def adopt(argv: list[str], environ: MutableMapping[str, str]) -> None:
    """Give a command run by hand the environment of its data directory's stack, if it has none of its own.

    Called by manage.py before Django. Migrations run as owner, the rest as operator; what is set already
    stays.
    """
    if environ.get("CORRAL_PG_DSN_APP") or len(argv) < 2 or argv[1] in _STACK_COMMANDS:
        return
    saved = load(Path(environ.get("CORRAL_VAR") or ROOT / "var"))
    if saved:
        saved["CORRAL_LOG_LEVEL"] = "WARNING"  # a command answers a person; its log lines are for services
        saved["CORRAL_DB_ROLE"] = "owner" if argv[1] in _OWNER_COMMANDS else "operator"
    for name, value in saved.items():
        environ.setdefault(name, value)
