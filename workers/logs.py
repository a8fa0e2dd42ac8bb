"""JSON log lines of the GPU side: one object per line, with the ids that `extra` carries. Never text of a
tenant.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

# The only fields of `extra` that reach a line: ids, codes and counts.
FIELDS: Final = (
    "machine", "replica", "request", "epoch", "code", "pid", "phase", "released", "n_streams", "deployment",
)  # fmt: skip


class JsonLines(logging.Formatter):
    """`fixed` is added to every line (machine, replica)."""

    def __init__(self, **fixed: str) -> None:
        super().__init__()
        self._fixed = fixed

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **self._fixed,
        }
        for name in FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        if record.exc_info and record.exc_info[0] is not None:
            # The place, not the message: an exception may quote what it choked on.
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            line["error"] = record.exc_info[0].__name__
            if trace is not None:
                line["where"] = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: int = logging.INFO, **fixed: str) -> None:
    """Log to stderr from now on; replaces whatever was configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(**fixed))
    logging.basicConfig(level=level, handlers=[handler], force=True)
