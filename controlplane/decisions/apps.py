"""Django registration of controlplane.decisions."""

from django.apps import AppConfig


class DecisionsConfig(AppConfig):
    name = "controlplane.decisions"
    label = "decisions"
