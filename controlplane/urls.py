"""Routes of the web process: the REST API under /api/v1, the console everywhere else.

`/v1` is not here: inference has its own processes (controlplane.gateway). Health is a middleware (health.py).
"""

from django.urls import include, path

urlpatterns = [
    path("api/v1/", include("controlplane.api.urls")),
    path("", include("controlplane.console.urls")),
]
