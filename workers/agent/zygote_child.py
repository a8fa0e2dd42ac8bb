"""What a forked child does once it has shed the zygote: redirect its output, call its entry.

Called by zygote.py.
"""

from __future__ import annotations

import importlib
import os
import traceback
from typing import Final

from workers.agent.zygote_protocol import ForkSpec
from workers.engine import forking

_APPEND: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def run_child(spec: ForkSpec) -> int:
    """In a child that has shed the zygote: redirect output, set the environment, call the entry; exit code."""
    forking.name_process("corral-replica")
    try:
        _redirect(spec.log)
        os.environ.update(spec.env)
        module, _, function = spec.entry.partition(":")
        return int(getattr(importlib.import_module(module), function)(dict(spec.argument)) or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _redirect(log: str) -> None:
    """Standard input from nowhere, output and errors to the end of the log."""
    null, sink = os.open(os.devnull, os.O_RDONLY), os.open(log, _APPEND, 0o600)
    for source, target in ((null, 0), (sink, 1), (sink, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(sink)
