"""`python -m controlplane.cli`."""

from controlplane.cli.main import main

main()
