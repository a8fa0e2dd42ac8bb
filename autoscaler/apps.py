"""Django registration of autoscaler."""

from django.apps import AppConfig


class AutoscalerConfig(AppConfig):
    name = "autoscaler"
    label = "autoscaler"
