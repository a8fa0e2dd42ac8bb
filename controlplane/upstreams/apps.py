"""Django registration of controlplane.upstreams."""

from django.apps import AppConfig


class UpstreamsConfig(AppConfig):
    name = "controlplane.upstreams"
    label = "upstreams"
