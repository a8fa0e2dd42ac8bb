"""Rules about service classes, and the lookup that tells gateways of them."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements, SameTenant

# Asked before a tenant is known, hence SECURITY DEFINER; whoever asks must know a key. It builds on the lookup of the
# key itself, whatever that says by now.
LOOKUP = """
CREATE FUNCTION corral_key_lookup_slo(p_lookup text, p_cell text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    found jsonb := corral_key_lookup_in(p_lookup, p_cell);
BEGIN
    IF found IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN found || jsonb_build_object('slo', jsonb_build_object(
        'classes', (
            SELECT jsonb_agg(jsonb_build_object(
                'name', c.name, 'band', c.band, 'ttft_ms', c.ttft_ms, 'itl_ms', c.itl_ms,
                'deadline_s', c.deadline_s, 'objective_ppm', c.objective_ppm) ORDER BY c.band)
            FROM deployments_sloclass c),
        'rules', coalesce((
            SELECT jsonb_agg(jsonb_build_object(
                'slo_class', r.slo_class_id, 'is_default', r.is_default,
                'deployment', coalesce(corral_hex(r.deployment_id), ''),
                'key', coalesce(corral_hex(r.api_key_id), ''),
                'ttft_ms', r.ttft_ms, 'itl_ms', r.itl_ms, 'deadline_s', r.deadline_s,
                'objective_ppm', r.objective_ppm) ORDER BY r.id)
            FROM slo_slorule r
            WHERE r.project_id = (found -> 'project' ->> 'id')::uuid
              AND (r.api_key_id IS NULL OR r.api_key_id = (found -> 'key' ->> 'id')::uuid)), '[]'::jsonb),
        'admission', coalesce((
            SELECT jsonb_object_agg(corral_hex(d.id), d.admission)
            FROM jsonb_array_elements(found -> 'deployments') AS each
            JOIN deployments_deployment d ON d.id = (each ->> 'id')::uuid
            WHERE d.admission <> 'auto'), '{}'::jsonb),
        -- A class has a price of its own where one is in force that is called <price of the deployment>-<class>.
        'prices', coalesce((
            SELECT jsonb_object_agg(priced.deployment, priced.by_class)
            FROM (
                SELECT each ->> 'id' AS deployment, jsonb_object_agg(c.name, jsonb_build_object(
                    'version', corral_hex(v.id),
                    'input_nano_per_million', v.input_nano_per_million,
                    'cached_nano_per_million', v.cached_nano_per_million,
                    'output_nano_per_million', v.output_nano_per_million)) AS by_class
                FROM jsonb_array_elements(found -> 'deployments') AS each
                JOIN billing_priceversion own ON own.id = (each -> 'price' ->> 'version')::uuid
                CROSS JOIN deployments_sloclass c
                JOIN LATERAL (
                    SELECT * FROM billing_priceversion p
                    WHERE p.name = own.name || '-' || c.name AND p.valid_from <= now()
                      AND (p.organization_id IS NULL
                           OR p.organization_id = (found -> 'organization' ->> 'id')::uuid)
                    ORDER BY p.organization_id NULLS LAST, p.valid_from DESC LIMIT 1
                ) v ON true
                GROUP BY each ->> 'id'
            ) AS priced), '{}'::jsonb)
    ));
END
$$;
REVOKE ALL ON FUNCTION corral_key_lookup_slo(text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_lookup_slo(text, text) TO corral_app, corral_operator;
"""
UNDO_LOOKUP = "DROP FUNCTION corral_key_lookup_slo(text, text)"

TRIGGERS = """
CREATE FUNCTION corral_note_slo_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    INSERT INTO corral_change (ref) VALUES ('prj:' || replace(coalesce(NEW.project_id, OLD.project_id)::text, '-', ''));
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_slo_change() FROM PUBLIC;
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON slo_slorule
    FOR EACH ROW EXECUTE FUNCTION corral_note_slo_change();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON slo_slorule
    FOR EACH ROW EXECUTE FUNCTION corral_audit('slo_rule', 'organization_id');
"""
UNDO_TRIGGERS = """
DROP TRIGGER audit ON slo_slorule;
DROP TRIGGER note_change ON slo_slorule;
DROP FUNCTION corral_note_slo_change();
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('deployments', '0006_admission'),
        ('tenants', '0005_management'),
        ('audit', '0001_initial'),
        ('billing', '0004_spent_in_cell'),
    ]

    operations = [
        migrations.CreateModel(
            name='SloRule',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('is_default', models.BooleanField(default=False, help_text='requests that name no class get this one')),
                ('ttft_ms', models.PositiveIntegerField(blank=True, help_text='NULL: as the class', null=True)),
                ('itl_ms', models.PositiveIntegerField(blank=True, null=True)),
                ('deadline_s', models.PositiveIntegerField(blank=True, null=True)),
                ('objective_ppm', models.PositiveIntegerField(blank=True, help_text='millionths of the requests that must meet all targets', null=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('api_key', models.ForeignKey(blank=True, db_constraint=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.apikey')),
                ('deployment', models.ForeignKey(blank=True, db_constraint=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='deployments.deployment')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='slo_rules', to='tenants.organization')),
                ('project', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='slo_rules', to='tenants.project')),
                ('slo_class', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, to='deployments.sloclass')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('project', 'api_key', 'deployment', 'slo_class'), name='slorule_unique', nulls_distinct=False), models.UniqueConstraint(condition=models.Q(('is_default', True)), fields=('project', 'api_key', 'deployment'), name='slorule_one_default', nulls_distinct=False), models.CheckConstraint(condition=models.Q(('objective_ppm__isnull', True), models.Q(('objective_ppm__gte', 500000), ('objective_ppm__lte', 999999)), _connector='OR'), name='slorule_objective_in_range'), models.CheckConstraint(condition=models.Q(models.Q(('ttft_ms__isnull', True), models.Q(('ttft_ms__gte', 1), ('ttft_ms__lte', 86400000)), _connector='OR'), models.Q(('itl_ms__isnull', True), models.Q(('itl_ms__gte', 1), ('itl_ms__lte', 60000)), _connector='OR'), models.Q(('deadline_s__isnull', True), models.Q(('deadline_s__gte', 1), ('deadline_s__lte', 604800)), _connector='OR')), name='slorule_targets_in_range')],
            },
        ),
        EnableRLS("SloRule"),
        SameTenant("SloRule", "project"),
        SameTenant("SloRule", "api_key"),
        SameTenant("SloRule", "deployment"),
        RunStatements(TRIGGERS, UNDO_TRIGGERS, what="Gateways and the audit log hear of rules"),
        RunStatements(LOOKUP, UNDO_LOOKUP, what="Gateways read the rules with a key"),
    ]
