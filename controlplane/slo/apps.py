"""Django registration of controlplane.slo."""

from django.apps import AppConfig


class SloConfig(AppConfig):
    name = "controlplane.slo"
    label = "slo"
