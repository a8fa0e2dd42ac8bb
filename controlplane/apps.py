"""Django registration of the project itself: its management commands and its Celery application."""

from django.apps import AppConfig


class ControlPlaneConfig(AppConfig):
    name = "controlplane"
    label = "controlplane"

    def ready(self) -> None:
        """Make our Celery application the current one, so that tasks called from the web reach its broker."""
        from controlplane import celery  # noqa: F401
