#!/usr/bin/env python
"""Entry point of every command: `manage.py up` runs the local stack, `manage.py migrate` the schema."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "controlplane.settings")
    from django.core.management import execute_from_command_line

    from infra.local.environment import adopt

    adopt(sys.argv, os.environ)  # read by the settings, which load on execution

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
