"""The page of limits on end customers: listed and found, set, changed and removed, by those who set limits."""

from __future__ import annotations

import pytest
from django.conf import settings
from django.test import Client

from controlplane.endcustomers import services
from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.tenants.context import tenant
from controlplane.tenants.end_customers import pseudonym
from controlplane.tenants.limits import Limits
from tests.booked import book_usage
from tests.world import World


def page(client: Client, path: str = "/end-customers") -> str:
    return " ".join(client.get(path).content.decode().split())


def whose(world: World, named: str) -> str:
    return pseudonym(settings.ENV.digest_secret, world.organization.id.hex, named)


def rows(world: World) -> dict[str, Limits]:
    with tenant(world.organization.id):
        return {row.customer: row.limits for row in EndCustomerLimits.objects.all()}


def test_limits_are_set_changed_and_removed(owner: Client, world: World) -> None:
    assert "Your customers are not limited" in page(owner)
    form = {"project": world.project.id.hex, "rpm": "20", "budget": "2.50"}
    assert owner.post("/end-customers/limit", {**form, "end_customer": " jane "}).status_code == 302
    assert (
        owner.post("/end-customers/limit", {"project": world.project.id.hex, "rpm": "3"}).status_code == 302
    )
    jane = whose(world, "jane")
    assert rows(world) == {jane: Limits(rpm=20, budget_nano=2_500_000_000), "": Limits(rpm=3)}
    with tenant(world.organization.id):
        path = f"/end-customers/{EndCustomerLimits.objects.get(customer=jane)}"
    assert 'name="rpm" value="20"' in page(owner, path) and 'name="budget" value="2.5"' in page(owner, path)
    assert owner.post(f"{path}/change", {"rpm": "21", "max_concurrency": "2"}).status_code == 302
    assert rows(world)[jane] == Limits(rpm=21, max_concurrency=2)
    assert owner.post(f"{path}/change", {"delete": "1"}).status_code == 302
    assert list(rows(world)) == [""]
    assert owner.get(path).status_code == owner.post(f"{path}/change", {"rpm": "1"}).status_code == 404


@pytest.mark.parametrize(
    ("field", "value"),
    [("rpm", "-1"), ("budget", "much"), ("project", "0" * 32), ("end_customer", "x" * 513)],
)
def test_what_is_wrong_is_said_at_its_field(owner: Client, world: World, field: str, value: str) -> None:
    answer = owner.post("/end-customers/limit", {"project": world.project.id.hex, "rpm": "2", field: value})
    assert (answer.status_code, list(answer.context["form"].errors)) == (400, [field])
    assert not rows(world)


def test_they_are_found_by_the_programs_id_with_what_was_spent(owner: Client, world: World) -> None:
    ids = {"organization_id": world.organization.id, "project_id": world.project.id}
    services.set_limits(**ids, limits=Limits(budget_nano=60_000), end_customer="jane")  # type: ignore[arg-type]
    services.set_limits(**ids, limits=Limits(rpm=4), end_customer="joe")  # type: ignore[arg-type]
    for _ in range(3):
        book_usage(world, end_customer=whose(world, "jane"))  # 15,000 each
    for query in ("jane", whose(world, "jane")):
        text = page(owner, f"/end-customers?customer={query}")
        assert whose(world, "joe") not in text
        assert 'class="fill" width="75"' in text and "$0.000045 of $0.00006" in text
    assert "No such limits" in page(owner, "/end-customers?customer=nobody")
    assert whose(world, "joe") in page(owner, f"/end-customers?project={world.project.id.hex}")


def test_many_come_in_pages_and_keep_the_filter(owner: Client, world: World) -> None:
    with tenant(world.organization.id):
        EndCustomerLimits.objects.bulk_create(
            EndCustomerLimits(
                organization_id=world.organization.id,
                project_id=world.project.id,
                customer=f"{n:024x}",
                rpm=1,
            )
            for n in range(51)
        )
    first = page(owner, f"/end-customers?project={world.project.id.hex}")
    assert f"{0:024x}" not in first and f"project={world.project.id.hex}&amp;page=2" in first
    assert f"{0:024x}" in page(owner, "/end-customers?page=2")


def test_who_sets_no_limits_has_no_such_page(owner: Client, viewer: Client, stranger: Client) -> None:
    assert 'href="/end-customers"' in page(owner, "/budgets")
    assert 'href="/end-customers"' not in page(viewer, "/budgets")
    assert viewer.get("/end-customers").status_code == 403
    assert "not limited" in page(stranger)  # of its own organization
