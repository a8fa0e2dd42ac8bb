"""Sends one plain-text mail from a template. Used by services, after commit; never raises and never logs what it says.

Where mail goes is CORRAL_EMAIL_URL (settings.email_settings): an SMTP server, the console, or files under var/mail.
"""

from __future__ import annotations

from collections.abc import Mapping
from smtplib import SMTPException

import structlog
from django.core.mail import EmailMessage
from django.template.loader import render_to_string

log = structlog.get_logger("corral.mail")


def send(*, to: str, subject: str, template: str, context: Mapping[str, object]) -> bool:
    """Whether the mail server took it. Bounded by EMAIL_TIMEOUT."""
    body = render_to_string(template, dict(context))
    try:
        # One line: a name with a line break in it must not become a header.
        EmailMessage(subject=" ".join(subject.split()), body=body, to=[to]).send()
    except (OSError, SMTPException) as error:
        log.warning("mail.not_sent", template=template, error=type(error).__name__)
        return False
    log.info("mail.sent", template=template)
    return True
