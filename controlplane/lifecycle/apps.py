"""Django registration of controlplane.lifecycle."""

from django.apps import AppConfig


class LifecycleConfig(AppConfig):
    name = "controlplane.lifecycle"
    label = "lifecycle"
