"""A pool's decisions on sick machines, and why a tenant's machines leave."""

from django.db import migrations, models

from controlplane.tenants.rls import TENANT, RunStatements

# Beside corral_my_machines(): the same machines, and nothing of the others.
FUNCTIONS = """
CREATE FUNCTION corral_my_machines_reasons() RETURNS TABLE (id uuid, reason text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT m.id, m.reason FROM autoscaler_machine m
    WHERE m.state <> 'gone' AND EXISTS (
        SELECT 1 FROM autoscaler_replica r
        WHERE r.machine_id = m.id AND r.organization_id = {TENANT} AND r.phase NOT IN ('stopped', 'failed')
    )
$$;
REVOKE ALL ON FUNCTION corral_my_machines_reasons() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_my_machines_reasons() TO corral_app, corral_operator;
""".replace("{TENANT}", TENANT)
UNDO = "DROP FUNCTION corral_my_machines_reasons();"
KINDS = ["purchase", "health", "pool"]


class Migration(migrations.Migration):
    dependencies = [("autoscaler", "0013_planned_source")]

    operations = [
        migrations.RemoveConstraint(model_name="pooldecision", name="pooldecision_kind_known"),
        migrations.AlterField(
            model_name="pooldecision",
            name="kind",
            field=models.CharField(
                choices=[("purchase", "Purchase"), ("health", "Health"), ("pool", "Pool")], max_length=16
            ),
        ),
        migrations.AddConstraint(
            model_name="pooldecision",
            constraint=models.CheckConstraint(
                condition=models.Q(("kind__in", KINDS)), name="pooldecision_kind_known"
            ),
        ),
        RunStatements(FUNCTIONS, UNDO, what="Tell a tenant why machines leave that its replicas live on"),
    ]
