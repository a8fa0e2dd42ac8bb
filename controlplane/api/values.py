"""Values that several resources have: ids with their prefix, limits, money as integers of nano-dollars."""

from __future__ import annotations

from typing import Annotated, Any, Final
from uuid import UUID

from ninja import Field, Schema
from pydantic import BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema, model_validator

from controlplane import ids
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import LimitColumns

MAX_32: Final = 2**31 - 1
MAX_64: Final = 2**63 - 1


def _id(prefix: ids.Prefix) -> Any:
    """A pydantic type: UUID inside, `<prefix>_<32 hex>` outside."""

    def read(value: object) -> UUID:
        if isinstance(value, UUID):
            return value
        return ids.from_text(prefix, str(value))

    shape = {
        "type": "string",
        "pattern": f"^{prefix.value}_[0-9a-f]{{32}}$",
        "examples": [f"{prefix.value}_0193f2c47e1a7b3c9d5e6f7081920a1b"],
    }
    return Annotated[
        UUID,
        BeforeValidator(read),
        PlainSerializer(lambda value: ids.to_text(prefix, value), return_type=str),
        WithJsonSchema(shape),
    ]


OrganizationId = _id(ids.Prefix.ORGANIZATION)
ProjectId = _id(ids.Prefix.PROJECT)
MemberId = _id(ids.Prefix.MEMBER)
UserId = _id(ids.Prefix.USER)
InvitationId = _id(ids.Prefix.INVITATION)
DomainId = _id(ids.Prefix.DOMAIN)
IdentityProviderId = _id(ids.Prefix.IDENTITY_PROVIDER)
ScimTokenId = _id(ids.Prefix.SCIM_TOKEN)
KeyId = _id(ids.Prefix.API_KEY)
ServiceAccountId = _id(ids.Prefix.SERVICE_ACCOUNT)
TokenId = _id(ids.Prefix.MANAGEMENT_TOKEN)
ModelVersionId = _id(ids.Prefix.MODEL_VERSION)
AdapterId = _id(ids.Prefix.ADAPTER)
DeploymentId = _id(ids.Prefix.DEPLOYMENT)
BudgetId = _id(ids.Prefix.BUDGET)
ReplicaId = _id(ids.Prefix.REPLICA)
MachineId = _id(ids.Prefix.MACHINE)
DecisionId = _id(ids.Prefix.DECISION)
OperationId = _id(ids.Prefix.OPERATION)
GrantId = _id(ids.Prefix.GRANT)
WebhookId = _id(ids.Prefix.WEBHOOK)
EventId = _id(ids.Prefix.EVENT)
DeliveryId = _id(ids.Prefix.DELIVERY)
QuotaId = _id(ids.Prefix.QUOTA)
UpstreamId = _id(ids.Prefix.UPSTREAM)
EndCustomerLimitsId = _id(ids.Prefix.END_CUSTOMER_LIMITS)
SloRuleId = _id(ids.Prefix.SLO_RULE)
ExportId = _id(ids.Prefix.EXPORT)
ErasureId = _id(ids.Prefix.ERASURE)
SloAlertId = _id(ids.Prefix.SLO_ALERT)
EngineProfileId = _id(ids.Prefix.ENGINE_PROFILE)
RolloutId = _id(ids.Prefix.ROLLOUT)

Name = Annotated[str, Field(min_length=1, max_length=120, pattern=r"\S")]
Slug = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[-a-zA-Z0-9_]+$")]
Weight = Annotated[int, Field(ge=1, le=10_000, description="Share of a full queue, 100 is ordinary")]
_Count = Annotated[int, Field(ge=0, le=MAX_32)]


def _has_nul(value: Any) -> bool:
    """Bounded by the parser's own depth."""
    if isinstance(value, str):
        return "\x00" in value
    if isinstance(value, dict):
        return any(_has_nul(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_has_nul(part) for part in value)


class Body(Schema):
    """What a write sends. Unknown fields are refused: a misspelt one would be lost in silence."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        if _has_nul(value):
            raise ValueError("text must not contain the character U+0000: the database cannot hold it")
        return value


class LimitsValue(Body):
    """Limits at one level; null or left out is no limit there. The tightest of key, project, organization counts."""

    rpm: _Count | None = Field(default=None, description="Requests per minute", examples=[600])
    input_tpm: _Count | None = Field(default=None, description="Prompt tokens per minute")
    output_tpm: _Count | None = Field(default=None, description="Completion tokens per minute")
    max_concurrency: _Count | None = Field(default=None, description="Requests in flight")
    budget_nano: Annotated[int, Field(ge=0, le=MAX_64)] | None = Field(
        default=None, description="Money that may be spent, in nano-dollars", examples=[25_000_000_000]
    )

    def as_limits(self) -> Limits:
        return Limits(**self.model_dump())


def limits_of(row: LimitColumns) -> LimitsValue:
    return LimitsValue(
        rpm=row.rpm,
        input_tpm=row.input_tpm,
        output_tpm=row.output_tpm,
        max_concurrency=row.max_concurrency,
        budget_nano=row.budget_nano,
    )
