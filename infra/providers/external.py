"""The machine on which endpoints elsewhere are called: an agent beside the control worker, as the local provider starts
one, with the upstream engine and nothing to load.

Its processes call out and are called by nobody; they hold the endpoints' credentials. A directory and a name of its
own keep it apart from the machines that the pool owns.
"""

from __future__ import annotations

from infra.providers.local import LocalProvider

DIRECTORY = "external"  # under <var>


class ExternalProvider(LocalProvider):
    """One machine of this kind per cell."""

    name = "external"
