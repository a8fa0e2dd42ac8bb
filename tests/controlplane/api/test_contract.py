"""The API keeps to its own document, whatever is sent: generated calls, good and bad, for every operation.

`pytest -m full` sends more of them. A failure prints the call as a curl command.
"""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import schemathesis
from django.core.signals import request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from controlplane.tenants.models import Role
from tests.controlplane.api.caller import token_of
from tests.controlplane.api.test_matrix import Acme
from tests.world import World

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
served = get_wsgi_application()


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The web process, on the test's own connection: what ends a request must not close it."""
    request_started.disconnect(close_old_connections)
    try:
        return [served(environ, start_response).content]
    finally:
        request_started.connect(close_old_connections)


schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", application)


def generated(n: int) -> Any:
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def caller(world: World) -> dict[str, Any]:
    """Acme's owner, and ids of what is there: half of the calls name something real."""
    acme = Acme(world)
    return {
        "headers": {"Authorization": f"Bearer {token_of(world.organization.id, Role.OWNER)}"},
        "ids": acme.ids,
    }


def answer(case: Any, caller: dict[str, Any]) -> int:
    """The status of one generated call, after schemathesis has held it to the document (it raises what it finds)."""
    if zlib.crc32(repr((case.path_parameters, case.query, case.body)).encode()) % 2:
        real = {name: caller["ids"][name] for name in case.path_parameters if name in caller["ids"]}
        case.path_parameters.update(real)
    case.headers.update(caller["headers"])
    return case.call_and_validate(checks=CHECKS).status_code


@schema.parametrize()
@generated(15)
def test_every_operation_keeps_to_the_document(case: Any, caller: dict[str, Any]) -> None:
    assert answer(case, caller) < 500


@pytest.mark.full
@pytest.mark.timeout(900)  # 200 calls, perhaps on a machine that others use
@schema.parametrize()
@generated(200)
def test_every_operation_keeps_to_the_document_for_long(case: Any, caller: dict[str, Any]) -> None:
    assert answer(case, caller) < 500
