"""A supervisor as a program of its own, for tests to run and kill.

`python -m tests.infra.local.supervised VAR JSON`: the JSON is a list of ProcessSpec fields; changes are
printed as "name phase detail", one per line.
"""

import json
import os
import sys
from pathlib import Path

from infra.local.restart import RestartPolicy
from infra.local.stackstate import AlreadyRunningError, hold_stack
from infra.local.supervisor import ProcessSpec, Supervisor


def main() -> int:
    var = Path(sys.argv[1])
    specs = []
    for fields in json.loads(sys.argv[2]):
        ready_file, env_file = fields.pop("ready_file", None), fields.pop("env_file", None)
        specs.append(
            ProcessSpec(
                **{
                    "env": (lambda path=env_file: {"PATH": os.defpath, **json.loads(Path(path).read_text())})
                    if env_file
                    else {"PATH": os.defpath},
                    "log_path": var / "log" / f"{fields['name']}.log",
                    "marker": fields["argv"][0],
                    "restart": RestartPolicy(
                        n_deaths=3, window_s=60, first_delay_s=0.02, longest_delay_s=0.05
                    ),
                    "ready": (lambda _pid, path=ready_file: Path(path).exists()) if ready_file else None,
                    **fields,
                    "depends_on": tuple(fields.get("depends_on", ())),
                }
            )
        )
    supervisor = Supervisor(
        specs,
        var=var,
        facts={},
        report=lambda name, phase, detail, _s: print(name, phase, detail.replace("\n", " | "), flush=True),
    )
    try:
        with hold_stack(var, lambda text: print(text, flush=True)):
            return supervisor.run()
    except AlreadyRunningError as error:
        print(error, flush=True)
        return 3


if __name__ == "__main__":
    sys.exit(main())
