"""Django registration of controlplane.scim."""

from django.apps import AppConfig


class ScimConfig(AppConfig):
    name = "controlplane.scim"
    label = "scim"
