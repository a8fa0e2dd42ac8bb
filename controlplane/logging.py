"""JSON log lines with ids, and never a prompt, a completion, a key or a secret.

Every process of the trusted side (web, control worker, gateway) calls `configure` or uses `logging_config`;
ids are bound once per request or task with structlog's context variables. Imports no Django.
"""

import logging.config
from typing import Any

import structlog
from structlog.types import EventDict, WrappedLogger

# Field names under which text of a tenant or a secret could slip into a line. The value is dropped, the name
# kept, so that the author of the line notices.
FORBIDDEN_FIELDS = frozenset(
    {
        "api_key",
        "authorization",
        "body",
        "completion",
        "content",
        "cookie",
        "dsn",
        "messages",
        "password",
        "prompt",
        "secret",
        "text",
        "token",
    }
)


def drop_forbidden(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace the value of every forbidden field; the last processor before rendering."""
    for name in FORBIDDEN_FIELDS & event.keys():
        event[name] = "[dropped]"
    return event


_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]


def logging_config(*, level: str = "INFO") -> dict[str, Any]:
    """A dictConfig that renders structlog and standard-library records alike as one JSON object per line."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": _SHARED,
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.format_exc_info,
                    drop_forbidden,
                    structlog.processors.JSONRenderer(),
                ],
            },
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            # One access line per request is ours to write (RequestLogMiddleware), with ids and without
            # queries.
            "uvicorn.access": {"handlers": [], "propagate": False},
            "django.server": {"handlers": [], "propagate": False},
            # Beat and the worker would say four lines for every housekeeping task, several times a second.
            "celery.beat": {"level": "WARNING"},
            "celery.worker.strategy": {"level": "WARNING"},
            "celery.app.trace": {"level": "WARNING"},
            # Our own commands' calls to our own gateway; its log has them.
            "httpx": {"level": "WARNING"},
            # SQL parameters would carry tenants' data.
            "django.db.backends": {"level": "WARNING"},
        },
    }


def configure(*, level: str = "INFO") -> None:
    """Set up logging in a process that does not load Django's settings (the gateway)."""
    logging.config.dictConfig(logging_config(level=level))
