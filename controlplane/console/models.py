"""What the console itself keeps: failed sign-ins, for throttle.py."""

from django.db import models


class SignInFailures(models.Model):
    """Failures of one subject (e-mail and address, or address) since a moment. Belongs to no tenant."""

    subject = models.BinaryField(primary_key=True, max_length=32, help_text="SHA-256")
    n_failures = models.PositiveSmallIntegerField()
    since = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return bytes(self.subject).hex()[:12]
