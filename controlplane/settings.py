"""Django settings of the web process, the control worker and the management commands.

The environment is read once, here, into `ENV`; nothing else on the Django side reads it. Values that are
missing stay empty and fail closed at first use: Django refuses an empty SECRET_KEY, psycopg an empty database
name, and api_keys.digest an empty pepper. Entry points call `ENV.require()` to fail at start with one
message.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from csp.constants import NONCE, NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from autoscaler.config import AutoscalerConfig
from controlplane.deployments.licences import ENTRY as LICENCE
from controlplane.logging import logging_config
from controlplane.outbound import Network, allowed_networks
from controlplane.tenants.api_keys import Peppers

BASE_DIR = Path(__file__).resolve().parent.parent
ROLES = ("app", "operator", "owner")
POOLERS = ("", "transaction")


@dataclass(frozen=True)  # no slots: `read` takes the defaults from the class
class Environment:
    """Everything the Django side takes from the environment (CORRAL_ + upper-case name, unless noted)."""

    var: Path  # data directory
    cell: str = "c0"
    redis_url: str = field(default="", repr=False)
    pg_dsn: Mapping[str, str] = field(default_factory=dict, repr=False)  # role -> CORRAL_PG_DSN_<ROLE>
    # What stands before PostgreSQL: "" nothing or a pooler that gives whole sessions, "transaction" one that gives a
    # connection for a transaction only.
    pg_pooler: str = ""
    db_role: str = "app"  # which role the `default` connection uses
    secret_key: str = field(default="", repr=False)
    key_pepper: bytes = field(default=b"", repr=False)  # hex in the environment
    key_pepper_previous: bytes = field(default=b"", repr=False)  # accepted, too, while the pepper changes
    key_pepper_next: bytes = field(default=b"", repr=False)
    digest_secret: bytes = field(default=b"", repr=False)  # empty: the pepper is
    secret_key_previous: str = field(default="", repr=False)  # what it signed and sealed still opens
    gateway_url: str = "http://127.0.0.1:8400"
    console_url: str = "http://127.0.0.1:8401"
    gateway_key_stale_s: int = 900  # how long gateways may go on with a key they cannot read again
    # Calls of /api/v1 by one management token, in one web process; four times that at once.
    api_rate_per_s: int = 50
    control_metrics_port: int = 0  # where the control worker serves /metrics, on loopback; 0 = nowhere
    engine: str = "vllm"  # what the demo deployment runs on: vllm, or toy where vllm cannot run
    static_root: Path | None = None
    debug: bool = False
    log_level: str = "INFO"
    # smtp://user:password@host:587 (STARTTLS), smtps://…:465, console:, or empty for files under var/mail
    email_url: str = field(default="", repr=False)
    email_from: str = "Corral <corral@localhost>"
    adapter_store: str = ""  # s3://bucket/prefix that tenants upload LoRA adapters to; empty: there is none
    model_licences: tuple[str, ...] = ()  # of models that may be served; empty: deployments/licences.py
    outbound_allow: tuple[Network, ...] = ()  # private networks that tenants' webhooks may call
    # 12 connections x (web + worker + beat) stays far below the embedded server's limit of 100.
    pg_pool_size: int = 12
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """Parse and check; raises ImproperlyConfigured naming the variable, its value and the remedy."""

        def number(name: str, default: int, low: int, high: int) -> int:
            text = environ.get(name, str(default))
            if not text.isdigit() or not low <= int(text) <= high:
                raise ImproperlyConfigured(f"{name}={text!r}: set a whole number from {low} to {high}")
            return int(text)

        role = environ.get("CORRAL_DB_ROLE", "app")
        if role not in ROLES:
            raise ImproperlyConfigured(f"CORRAL_DB_ROLE={role!r}: set one of {', '.join(ROLES)}")
        pooler = environ.get("CORRAL_PG_POOLER", "")
        if pooler not in POOLERS:
            raise ImproperlyConfigured(f"CORRAL_PG_POOLER={pooler!r}: set transaction, or leave it out")
        try:
            digest_secret = bytes.fromhex(environ.get("CORRAL_DIGEST_SECRET", ""))
            pepper, previous, upcoming = (
                bytes.fromhex(environ.get(f"CORRAL_KEY_PEPPER{which}", ""))
                for which in ("", "_PREVIOUS", "_NEXT")
            )
        except ValueError as error:
            raise ImproperlyConfigured(
                "CORRAL_KEY_PEPPER, …_PREVIOUS, …_NEXT: set at least 32 hex digits"
            ) from error
        try:
            networks = allowed_networks(environ.get("CORRAL_OUTBOUND_ALLOW", ""))
        except ValueError as error:
            raise ImproperlyConfigured(f"CORRAL_OUTBOUND_ALLOW: {error}") from error
        adapter_store = environ.get("CORRAL_ADAPTER_STORE", "")
        if adapter_store and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^?#]*)?", adapter_store):
            raise ImproperlyConfigured(
                f"CORRAL_ADAPTER_STORE={adapter_store!r}: set s3://bucket or s3://bucket/prefix"
            )
        console_url = environ.get("CORRAL_CONSOLE_URL", cls.console_url)
        hosts = [host for host in environ.get("CORRAL_ALLOWED_HOSTS", "").split(",") if host]
        console_host = urlsplit(console_url).hostname
        return cls(
            var=Path(environ.get("CORRAL_VAR", BASE_DIR / "var")),
            cell=environ.get("CORRAL_CELL", cls.cell),
            redis_url=environ.get("CORRAL_REDIS_URL", ""),
            pg_dsn={name: environ.get(f"CORRAL_PG_DSN_{name.upper()}", "") for name in ROLES},
            pg_pooler=pooler,
            db_role=role,
            secret_key=environ.get("CORRAL_SECRET_KEY", ""),
            key_pepper=pepper,
            key_pepper_previous=previous,
            key_pepper_next=upcoming,
            digest_secret=digest_secret or pepper,
            secret_key_previous=environ.get("CORRAL_SECRET_KEY_PREVIOUS", ""),
            gateway_url=environ.get("CORRAL_GATEWAY_URL", cls.gateway_url),
            console_url=console_url,
            gateway_key_stale_s=number("CORRAL_GATEWAY_KEY_STALE_S", cls.gateway_key_stale_s, 0, 86_400),
            api_rate_per_s=number("CORRAL_API_RATE_PER_S", cls.api_rate_per_s, 1, 100_000),
            control_metrics_port=number("CORRAL_CONTROL_METRICS_PORT", 0, 0, 65_535),
            engine=environ.get("CORRAL_ENGINE", cls.engine),
            static_root=Path(environ["CORRAL_STATIC_ROOT"]) if environ.get("CORRAL_STATIC_ROOT") else None,
            debug=environ.get("CORRAL_DEBUG", "") == "1",
            log_level=environ.get("CORRAL_LOG_LEVEL", cls.log_level).upper(),
            email_url=environ.get("CORRAL_EMAIL_URL", ""),
            email_from=environ.get("CORRAL_EMAIL_FROM", cls.email_from),
            adapter_store=adapter_store,
            model_licences=_licences(environ.get("CORRAL_MODEL_LICENCES", "")),
            outbound_allow=networks,
            pg_pool_size=number("CORRAL_PG_POOL_SIZE", cls.pg_pool_size, 2, 200),
            allowed_hosts=tuple(hosts) or (*cls.allowed_hosts, *([console_host] if console_host else [])),
        )

    @property
    def key_peppers(self) -> Peppers:
        """What keys and tokens are checked with."""
        return Peppers(self.key_pepper, self.key_pepper_previous, self.key_pepper_next)

    def require(self) -> None:
        """Raise one ImproperlyConfigured that lists every variable a serving process cannot do without."""
        missing = [
            name
            for name, value in (
                ("CORRAL_REDIS_URL", self.redis_url),
                (f"CORRAL_PG_DSN_{self.db_role.upper()}", self.pg_dsn.get(self.db_role)),
                ("CORRAL_SECRET_KEY", self.secret_key),
                ("CORRAL_KEY_PEPPER", self.key_pepper),
            )
            if not value
        ]
        if missing:
            raise ImproperlyConfigured(
                f"set {', '.join(missing)} (`manage.py up` sets them for the local stack)"
            )


def _licences(text: str) -> tuple[str, ...]:
    found = tuple(filter(None, (each.strip() for each in text.split(","))))
    for each in found:
        if not LICENCE.fullmatch(each):
            raise ImproperlyConfigured(
                f"CORRAL_MODEL_LICENCES={text!r}: set licences by their short names, e.g. apache-2.0,mit"
            )
    return found


ENV = Environment.read(os.environ)
AUTOSCALER = AutoscalerConfig.read(os.environ, console_url=ENV.console_url, var=ENV.var)


def database(dsn: str, *, statement_timeout_s: int, pool_size: int, pooler: str = "") -> dict[str, Any]:
    """Django's form of a `postgresql://` DSN, with every wait bounded. pool_size 0 = no pool.

    Behind a pooler in transaction mode nothing may belong to a session: no startup options (PgBouncer refuses them, so
    there the limits of the database role count, infra/local/roles.py) and no cursors that outlive a transaction.
    Statements are never prepared, with or without one. Our own pool stays: it saves the handshake with the pooler.
    """
    parts = urlsplit(dsn)
    limits = {
        "statement_timeout": statement_timeout_s * 1000,
        "lock_timeout": 3_000,
        "idle_in_transaction_session_timeout": 30_000,
    }
    options: dict[str, Any] = {
        **dict(parse_qsl(parts.query)),
        "connect_timeout": 3,
        # A server that vanished without a word (partition, power): given up after seconds, not TCP's quarter hour.
        "tcp_user_timeout": 10_000,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "application_name": "corral",
    }
    if not pooler:
        options["options"] = " ".join(f"-c {name}={value}" for name, value in limits.items())
    if pool_size:
        # timeout: how long a request waits for a connection before it fails (503) instead of queueing on.
        options["pool"] = {"min_size": 1, "max_size": pool_size, "timeout": 3, "max_waiting": 4 * pool_size}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.lstrip("/"),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
        # Without a pool a thread keeps its connection for a minute: intake runs every second.
        "CONN_MAX_AGE": 0 if pool_size else 60,
        # A connection is asked before it is used (0.1 ms), so that a restart of the server breaks no request.
        "CONN_HEALTH_CHECKS": True,
        "DISABLE_SERVER_SIDE_CURSORS": bool(pooler),
        "OPTIONS": options,
    }


def email_settings(url: str, *, var: Path) -> dict[str, Any]:
    """Django's settings for CORRAL_EMAIL_URL. Raises ImproperlyConfigured naming the forms it may have."""
    backends = "django.core.mail.backends"
    if not url:
        return {"EMAIL_BACKEND": f"{backends}.filebased.EmailBackend", "EMAIL_FILE_PATH": str(var / "mail")}
    parts = urlsplit(url)
    if parts.scheme == "console":
        return {"EMAIL_BACKEND": f"{backends}.console.EmailBackend"}
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
        raise ImproperlyConfigured(
            "CORRAL_EMAIL_URL: set smtp://user:password@host:587, smtps://user:password@host:465, console:, "
            "or leave it empty for files under CORRAL_VAR/mail"
        )
    has_tls = parts.scheme == "smtps"
    is_loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
    return {
        "EMAIL_BACKEND": f"{backends}.smtp.EmailBackend",
        "EMAIL_HOST": parts.hostname,
        "EMAIL_PORT": parts.port or (465 if has_tls else 587),
        "EMAIL_HOST_USER": unquote(parts.username or ""),
        "EMAIL_HOST_PASSWORD": unquote(parts.password or ""),
        "EMAIL_USE_SSL": has_tls,
        "EMAIL_USE_TLS": not has_tls and not is_loopback,  # a relay on this machine needs none
    }


_OWNER_STATEMENT_S = 600  # migrations rewrite tables

DATABASES = {
    "default": database(
        ENV.pg_dsn[ENV.db_role],
        statement_timeout_s=_OWNER_STATEMENT_S if ENV.db_role == "owner" else 10,
        pool_size=0 if ENV.db_role == "owner" else ENV.pg_pool_size,
        pooler=ENV.pg_pooler,
    ),
}
# The other roles, where the process was given them (commands and tests; the web process is given app alone).
if ENV.pg_dsn["operator"]:
    DATABASES["operator"] = database(
        ENV.pg_dsn["operator"], statement_timeout_s=10, pool_size=0, pooler=ENV.pg_pooler
    )
if ENV.pg_dsn["owner"]:
    DATABASES["owner"] = database(
        ENV.pg_dsn["owner"], statement_timeout_s=_OWNER_STATEMENT_S, pool_size=0, pooler=ENV.pg_pooler
    )
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

SECRET_KEY = ENV.secret_key
SECRET_KEY_FALLBACKS = [ENV.secret_key_previous] if ENV.secret_key_previous else []
DEBUG = ENV.debug
ALLOWED_HOSTS = list(ENV.allowed_hosts)
CSRF_TRUSTED_ORIGINS = [ENV.console_url]

INSTALLED_APPS = [
    "controlplane.apps.ControlPlaneConfig",
    "controlplane.tenants.apps.TenantsConfig",
    "controlplane.audit.apps.AuditConfig",
    "controlplane.identity.apps.IdentityConfig",
    "controlplane.scim.apps.ScimConfig",
    "controlplane.deployments.apps.DeploymentsConfig",
    "controlplane.adapters.apps.AdaptersConfig",
    "controlplane.slo.apps.SloConfig",
    "controlplane.decisions.apps.DecisionsConfig",
    "controlplane.operations.apps.OperationsConfig",
    "controlplane.lifecycle.apps.LifecycleConfig",
    "controlplane.budgets.apps.BudgetsConfig",
    "controlplane.webhooks.apps.WebhooksConfig",
    "controlplane.upstreams.apps.UpstreamsConfig",
    "controlplane.endcustomers.apps.EndCustomersConfig",
    "controlplane.quotas.apps.QuotasConfig",
    "controlplane.rollouts.apps.RolloutsConfig",
    "controlplane.api.apps.ApiConfig",
    "controlplane.console.apps.ConsoleConfig",
    "autoscaler.apps.AutoscalerConfig",
    "billing.apps.BillingConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "allauth.usersessions",
    "allauth.socialaccount",
    "allauth.socialaccount.providers.openid_connect",
    "allauth.socialaccount.providers.saml",
    "django_htmx",
    "csp",
]

MIDDLEWARE = [
    "controlplane.health.HealthMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "controlplane.middleware.RequestLogMiddleware",
    "controlplane.api.middleware.ApiMiddleware",
    "controlplane.api.scim.middleware.ScimMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "controlplane.tenants.middleware.TenantMiddleware",
]

ROOT_URLCONF = "controlplane.urls"
ASGI_APPLICATION = "controlplane.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "csp.context_processors.nonce",
            ],
        },
    },
]

AUTH_USER_MODEL = "tenants.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "/login"
LOGIN_REDIRECT_URL = "/"

# Sign-in flows are allauth's (docs/sign-in.md); what it asks us is answered in controlplane/identity/adapters.py.
ACCOUNT_ADAPTER = "controlplane.identity.adapters.AccountAdapter"
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
# Accounts are opened from an invitation's mail, or by who owns the domain.
ACCOUNT_EMAIL_VERIFICATION = "none"
ACCOUNT_EMAIL_UNKNOWN_ACCOUNTS = False
ACCOUNT_EMAIL_SUBJECT_PREFIX = ""
ACCOUNT_EMAIL_NOTIFICATIONS = True
# Django's own: allauth's keeps a table of addresses beside the users', which we do without.
ACCOUNT_PASSWORD_RESET_TOKEN_GENERATOR = "django.contrib.auth.tokens.PasswordResetTokenGenerator"  # noqa: S105
SOCIALACCOUNT_ADAPTER = "controlplane.identity.vouching.SocialAdapter"
SOCIALACCOUNT_EMAIL_VERIFICATION = "none"
SOCIALACCOUNT_REQUESTS_TIMEOUT = 5
SOCIALACCOUNT_PROVIDERS = {"openid_connect": {"OAUTH_PKCE_ENABLED": True}}
MFA_ADAPTER = "controlplane.identity.adapters.MfaAdapter"
MFA_FORMS = {
    "authenticate": "controlplane.identity.adapters.OnceForm",
    "reauthenticate": "controlplane.identity.adapters.OnceAgainForm",
    "add_webauthn": "controlplane.identity.key_answers.AddKeyForm",
    "authenticate_webauthn": "controlplane.identity.key_answers.UseKeyForm",
    "reauthenticate_webauthn": "controlplane.identity.key_answers.UseKeyAgainForm",
}
MFA_ALLOW_UNVERIFIED_EMAIL = True  # as above: every address is verified before there is an account
MFA_SUPPORTED_TYPES = ["totp", "webauthn", "recovery_codes"]
# Browsers give keys to pages of https and of localhost alone; the check of the origin knows only the former.
MFA_WEBAUTHN_ALLOW_INSECURE_ORIGIN = ENV.console_url.startswith("http://")
MFA_TOTP_ISSUER = "Corral"
MFA_TOTP_TOLERANCE = 1  # a code typed as its period ends still counts
MFA_RECOVERY_CODES_SHOW_ONCE = True

# In Postgres, like all that signing in needs, so that it adds no way to fail: allauth's counters and used codes.
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.db.DatabaseCache",
        "LOCATION": "identity_cache",
        "OPTIONS": {"MAX_ENTRIES": 100_000},
    }
}

globals().update(email_settings(ENV.email_url, var=ENV.var))
EMAIL_TIMEOUT = 10
DEFAULT_FROM_EMAIL = SERVER_EMAIL = ENV.email_from

SESSION_ENGINE = "django.contrib.sessions.backends.db"
SESSION_COOKIE_NAME = "corral_session"
SESSION_COOKIE_AGE = 14 * 24 * 3600
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"

_HTTPS = ENV.console_url.startswith("https://")
SESSION_COOKIE_SECURE = _HTTPS
CSRF_COOKIE_SECURE = _HTTPS
CSRF_COOKIE_NAME = "corral_csrf"
CSRF_FAILURE_VIEW = "controlplane.console.pages.csrf_failure"
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if _HTTPS else None
SECURE_HSTS_SECONDS = 31_536_000 if _HTTPS else 0
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

# The playground calls the gateway from the browser, so connect-src names it; nothing else leaves our origin.
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF, NONCE],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "font-src": [SELF],
        "connect-src": [SELF, ENV.gateway_url],
        "form-action": [SELF],
        "base-uri": [NONE],
        "frame-ancestors": [NONE],
    },
}

DATA_UPLOAD_MAX_MEMORY_SIZE = 1 << 20  # 1 MiB: the console and /api/v1 take small forms and JSON only
USE_TZ = True
TIME_ZONE = "UTC"
USE_I18N = False

STATIC_URL = "/static/"
# Straight from the apps' static folders, unless an image was built with `collectstatic` into this directory.
STATIC_ROOT = ENV.static_root
WHITENOISE_USE_FINDERS = ENV.static_root is None
WHITENOISE_AUTOREFRESH = DEBUG

LOGGING_CONFIG = "logging.config.dictConfig"
LOGGING = logging_config(level=ENV.log_level)
