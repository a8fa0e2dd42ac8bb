"""Routes of the web process: REST under /api/v1, SCIM under /scim/v2, enrolment of machines, the console elsewhere.

`/v1` is not here: inference has its own processes (controlplane.gateway). Health is a middleware (health.py).
"""

from django.urls import include, path

from controlplane.api.internal import enrol

urlpatterns = [
    path("internal/enrol", enrol),
    path("api/v1/", include("controlplane.api.urls")),
    path("scim/v2", include("controlplane.api.scim.urls")),
    path("", include("controlplane.console.account_urls")),
    path("", include("controlplane.console.urls")),
]

# Pages for what no view answered; they work with Postgres and Redis away.
handler400 = "controlplane.console.pages.bad_request"
handler403 = "controlplane.console.pages.forbidden"
handler404 = "controlplane.console.pages.not_found"
handler500 = "controlplane.console.pages.failed"
