"""ASGI entry point of the web process: `uvicorn controlplane.asgi:application`."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "controlplane.settings")

from django.conf import settings
from django.core.asgi import get_asgi_application

settings.ENV.require()
application = get_asgi_application()
