"""Row-level security and grants: tenants read their replicas and decisions, only the house writes."""

from django.db import migrations

from controlplane.tenants.rls import ALL, EnableRLS, Grant, SameTenant


class Migration(migrations.Migration):
    dependencies = [("autoscaler", "0001_initial"), ("deployments", "0002_isolation")]

    operations = [
        Grant("Machine", operator=ALL),
        EnableRLS("Replica", app="SELECT"),
        SameTenant("Replica", "deployment"),
        EnableRLS("Decision", app="SELECT", operator="SELECT, INSERT, DELETE"),
        SameTenant("Decision", "deployment"),
        EnableRLS("ScalerState", app=""),
        SameTenant("ScalerState", "deployment"),
    ]
