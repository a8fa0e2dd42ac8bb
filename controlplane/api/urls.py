"""Routes of /api/v1."""

from django.urls import path

from controlplane.api.app import api

urlpatterns = [path("", api.urls)]
