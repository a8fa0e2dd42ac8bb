"""Price versions: which one is in force, and adding a new one."""

from datetime import datetime
from uuid import UUID

from django.db.models import F, Q

from billing.models import PriceVersion
from billing.money import Rates
from controlplane.errors import InvalidInputError
from controlplane.saving import insert

DEFAULT_PRICE = "standard"


def price_in_force(*, organization_id: UUID, at: datetime, name: str = DEFAULT_PRICE) -> PriceVersion:
    """The newest version of this price at `at`; one agreed with the tenant goes before everybody's.

    Raises InvalidInputError where there is none of that name.
    """
    found = (
        PriceVersion.objects.filter(Q(organization_id=organization_id) | Q(organization_id=None))
        .filter(name=name, valid_from__lte=at)
        .order_by(F("organization_id").asc(nulls_last=True), "-valid_from")
        .first()
    )
    if found is None:
        raise InvalidInputError(f"price={name!r}: no such price is in force", field="price")
    return found


def create_price_version(
    *, name: str, rates: Rates, valid_from: datetime, organization_id: UUID | None = None
) -> PriceVersion:
    """A new price from `valid_from` on. Needs the operator role. ConflictError if that instant has one."""
    price = PriceVersion(
        organization_id=organization_id,
        name=name,
        input_nano_per_million=rates.input,
        cached_nano_per_million=rates.cached,
        output_nano_per_million=rates.output,
        valid_from=valid_from,
    )
    insert(price, taken={"priceversion_unique": ("valid_from", f"price {name!r} has a version from then on")})
    return price
