"""Django registration of controlplane.endcustomers."""

from django.apps import AppConfig


class EndCustomersConfig(AppConfig):
    name = "controlplane.endcustomers"
    label = "endcustomers"
