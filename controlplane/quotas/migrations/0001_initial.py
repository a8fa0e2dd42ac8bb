"""Quotas, and what counts against them."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import ALL, APP, TENANT, EnableRLS, RunStatements

# Machines are the house's and hidden from the app role, hence SECURITY DEFINER; a tenant is told sums of its own.
USE = f"""
CREATE FUNCTION corral_machine_use(p_organization uuid, p_cell text, p_since timestamptz)
RETURNS TABLE (n_machines int, nano_per_h bigint, gpu_s double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT
        (count(*) FILTER (WHERE m.state <> 'gone'))::int,
        coalesce(sum(m.price_nano_per_h) FILTER (WHERE m.state <> 'gone'), 0)::bigint,
        coalesce(sum(m.n_gpus * greatest(extract(epoch FROM
            coalesce(m.gone_at, now()) - greatest(m.created_at, p_since)), 0)), 0)::double precision
    FROM autoscaler_machine m
    WHERE (p_organization IS NULL OR m.launched_for = p_organization) AND (p_cell = '' OR m.cell = p_cell)
        AND (m.gone_at IS NULL OR m.gone_at > p_since)
$$;
REVOKE ALL ON FUNCTION corral_machine_use(uuid, text, timestamptz) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_machine_use(uuid, text, timestamptz) TO corral_operator;
CREATE FUNCTION corral_own_machine_use(p_since timestamptz)
RETURNS TABLE (n_machines int, nano_per_h bigint, gpu_s double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$ SELECT * FROM corral_machine_use(coalesce({TENANT}, '00000000-0000-0000-0000-000000000000'), '', p_since) $$;
REVOKE ALL ON FUNCTION corral_own_machine_use(timestamptz) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_own_machine_use(timestamptz) TO corral_app, corral_operator;

-- Tenants read ceilings; what they write is their own.
CREATE POLICY own_insert ON quotas_quota AS RESTRICTIVE FOR INSERT TO {APP} WITH CHECK (NOT by_house);
CREATE POLICY own_update ON quotas_quota AS RESTRICTIVE FOR UPDATE TO {APP}
    USING (NOT by_house) WITH CHECK (NOT by_house);
CREATE POLICY own_delete ON quotas_quota AS RESTRICTIVE FOR DELETE TO {APP} USING (NOT by_house);
-- The audit log is the tenants': what the house sets for itself is not in it.
CREATE TRIGGER audit AFTER INSERT OR UPDATE ON quotas_quota
    FOR EACH ROW WHEN (NEW.organization_id IS NOT NULL) EXECUTE FUNCTION corral_audit('quota', 'organization_id');
CREATE TRIGGER audit_deletion AFTER DELETE ON quotas_quota
    FOR EACH ROW WHEN (OLD.organization_id IS NOT NULL) EXECUTE FUNCTION corral_audit('quota', 'organization_id');
"""
UNDO_USE = """
DROP TRIGGER audit ON quotas_quota;
DROP TRIGGER audit_deletion ON quotas_quota;
DROP POLICY own_insert ON quotas_quota;
DROP POLICY own_update ON quotas_quota;
DROP POLICY own_delete ON quotas_quota;
DROP FUNCTION corral_own_machine_use(timestamptz);
DROP FUNCTION corral_machine_use(uuid, text, timestamptz);
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0005_management'),
        ('audit', '0001_initial'),
        ('autoscaler', '0007_quotas'),
    ]

    operations = [
        migrations.CreateModel(
            name='Quota',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('cell', models.CharField(blank=True, help_text="of the house's own; empty = all cells", max_length=32)),
                ('kind', models.CharField(choices=[('machines', 'Machines'), ('spend_rate', 'Spend Rate'), ('gpu_hours_day', 'Gpu Hours Day'), ('gpu_hours_week', 'Gpu Hours Week'), ('gpu_hours_month', 'Gpu Hours Month')], max_length=16)),
                ('limit', models.BigIntegerField()),
                ('by_house', models.BooleanField(help_text='a ceiling, which the tenant cannot change')),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('organization', models.ForeignKey(blank=True, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('organization', 'cell', 'kind', 'by_house'), name='quota_unique', nulls_distinct=False), models.CheckConstraint(condition=models.Q(('limit__gte', 0)), name='quota_not_negative'), models.CheckConstraint(condition=models.Q(('kind__in', ['machines', 'spend_rate', 'gpu_hours_day', 'gpu_hours_week', 'gpu_hours_month'])), name='quota_kind_known'), models.CheckConstraint(condition=models.Q(models.Q(('by_house', True), ('organization__isnull', True)), models.Q(('cell', ''), ('organization__isnull', False)), _connector='OR'), name='quota_level')],
            },
        ),
        EnableRLS("Quota", app=ALL, operator=ALL),
        RunStatements(USE, UNDO_USE, what="What machines a tenant has, and who may write which quota"),
    ]
