"""Routes of /scim/v2. What is none of them is a 404 in SCIM's form too."""

from django.urls import path

from controlplane.api.scim import views

urlpatterns = [
    path("/ServiceProviderConfig", views.service_provider_config),
    path("/ResourceTypes", views.resource_types),
    path("/ResourceTypes/<str:name>", views.resource_type),
    path("/Schemas", views.schemas),
    path("/Schemas/<str:name>", views.schema),
    path("/Users", views.users),
    path("/Users/.search", views.search_users),
    path("/Users/<str:name>", views.user),
    path("/Groups", views.groups),
    path("/Groups/.search", views.search_groups),
    path("/Groups/<str:name>", views.group),
    path("", views.nothing),
    path("/<path:path>", views.nothing),
]
