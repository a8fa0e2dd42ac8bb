"""Celery task of the audit log. Run by the control worker as operator, scheduled in controlplane/celery.py."""

import structlog
from celery import shared_task

from controlplane.audit import sealing

log = structlog.get_logger("corral.audit")
MAX_ORGANIZATIONS = 200  # a run; the next goes on


@shared_task(name="audit.seal")  # type: ignore[untyped-decorator]
def seal() -> None:
    """Seal the entries of every organization that has some. May run twice at once: one of the two waits its turn."""
    n_sealed = sum(sealing.seal(found) for found in sealing.unsealed_organizations(MAX_ORGANIZATIONS))
    if n_sealed:
        log.info("audit.sealed", n_sealed=n_sealed)
