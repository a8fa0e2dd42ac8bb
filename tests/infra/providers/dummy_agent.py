"""Stands in for `python -m workers.agent`: notes how it was called and waits. `stubborn` ignores SIGTERM, and
`with-child` leaves a process in a session of its own behind, as a zygote is.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    mode, args = sys.argv[1], sys.argv[2:]
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "with-child":
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        Path("child").write_text(str(child.pid))
    Path("called.new").write_text(json.dumps({"args": args, "env": dict(os.environ)}))
    Path("called.new").rename("called")
    if mode == "short":
        return
    time.sleep(600)


main()
