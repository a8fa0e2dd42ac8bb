"""What the visitor's role may, for links and buttons: `{% if request.membership|may:"webhooks:read" %}`."""

from __future__ import annotations

from django import template

from controlplane.tenants import rights
from controlplane.tenants.rights import Permission
from controlplane.tenants.selectors import Membership

register = template.Library()


@register.filter
def may(membership: Membership | None, permission: str) -> bool:
    return membership is not None and rights.may(membership.role, Permission(permission))
