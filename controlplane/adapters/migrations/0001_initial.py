"""Adapters of tenants, and which of them a gateway is told of with a key."""

import controlplane.adapters.models
import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements, SameTenant

# A key's record with the adapters of its project that can answer here and now: of a deployment of this cell that is
# there, takes adapters of that rank, and serves the very weights they were checked against.
LOOKUP = """
CREATE FUNCTION corral_with_adapters(p_found jsonb, p_cell text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    adapters jsonb;
BEGIN
    IF p_found IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT jsonb_agg(jsonb_build_object(
        'id', corral_hex(a.id),
        'deployment', corral_hex(d.id),
        'name', d.name || ':' || a.name,
        'created_at_ms', corral_ms(a.ready_at)
    ) ORDER BY a.id) INTO adapters
    FROM adapters_adapter a
    JOIN deployments_deployment d ON d.id = a.deployment_id
    JOIN deployments_modelversion m ON m.id = d.model_version_id
    WHERE a.project_id = (p_found -> 'project' ->> 'id')::uuid AND a.state = 'ready'
        AND d.project_id = a.project_id AND d.cell = p_cell AND d.deleted_at IS NULL
        AND m.digest = a.base_digest
        AND coalesce((d.engine_profile ->> 'max_loras')::integer, 0) > 0
        AND a.rank <= coalesce((d.engine_profile ->> 'max_lora_rank')::integer, 16);
    IF adapters IS NULL THEN
        RETURN p_found;
    END IF;
    RETURN p_found || jsonb_build_object('adapters', adapters);
END
$$;
REVOKE ALL ON FUNCTION corral_with_adapters(jsonb, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_with_adapters(jsonb, text) TO corral_app, corral_operator;

CREATE FUNCTION corral_note_adapter() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    it adapters_adapter := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    INSERT INTO corral_change (ref) VALUES ('prj:' || corral_hex(it.project_id));
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_adapter() FROM PUBLIC;
CREATE TRIGGER note_change AFTER UPDATE OR DELETE ON adapters_adapter
    FOR EACH ROW EXECUTE FUNCTION corral_note_adapter();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON adapters_adapter
    FOR EACH ROW EXECUTE FUNCTION corral_audit('adapter', 'organization_id');
"""
UNDO_LOOKUP = """
DROP TRIGGER audit ON adapters_adapter;
DROP TRIGGER note_change ON adapters_adapter;
DROP FUNCTION corral_note_adapter();
DROP FUNCTION corral_with_adapters(jsonb, text);
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('deployments', '0008_place'),
        ('tenants', '0009_found_by_digest'),
        ('audit', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='Adapter',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=48, validators=[controlplane.adapters.models.check_name])),
                ('state', models.CharField(choices=[('awaiting_upload', 'Awaiting'), ('checking', 'Checking'), ('ready', 'Ready'), ('refused', 'Refused'), ('retired', 'Retired')], default='awaiting_upload', max_length=16)),
                ('error_code', models.CharField(blank=True, max_length=64)),
                ('error_message', models.CharField(blank=True, max_length=500)),
                ('base_digest', models.CharField(help_text='of the model version it was made for', max_length=64)),
                ('digest', models.CharField(blank=True, help_text='SHA-256 of its manifest, lower-case hex', max_length=64)),
                ('source_uri', models.CharField(blank=True, help_text='where machines fetch it from', max_length=500)),
                ('size_bytes', models.BigIntegerField(default=0)),
                ('rank', models.PositiveSmallIntegerField(blank=True, null=True)),
                ('modules', models.JSONField(blank=True, default=list, help_text='kinds of layers it changes')),
                ('n_params', models.BigIntegerField(blank=True, null=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('ready_at', models.DateTimeField(blank=True, null=True)),
                ('retired_at', models.DateTimeField(blank=True, null=True)),
                ('purged_at', models.DateTimeField(blank=True, help_text='its files are gone since', null=True)),
                ('deployment', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='adapters', to='deployments.deployment')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='adapters', to='tenants.organization')),
                ('project', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='adapters', to='tenants.project')),
            ],
            options={
                'indexes': [models.Index(condition=models.Q(('state', 'ready')), fields=['project'], name='adapter_served'), models.Index(fields=['digest'], name='adapter_digest')],
                'constraints': [models.UniqueConstraint(condition=models.Q(('state__in', ['awaiting_upload', 'checking', 'ready'])), fields=('deployment', 'name'), name='adapter_name_unique'), models.UniqueConstraint(fields=('organization', 'id'), name='adapter_tenant_unique'), models.CheckConstraint(condition=models.Q(('name__regex', '^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$')), name='adapter_name_shape'), models.CheckConstraint(condition=models.Q(('state__in', ['awaiting_upload', 'checking', 'ready', 'refused', 'retired'])), name='adapter_state_known'), models.CheckConstraint(condition=models.Q(models.Q(('state', 'ready'), _negated=True), models.Q(('digest__regex', '^[0-9a-f]{64}$'), ('rank__gte', 1)), _connector='OR'), name='adapter_ready_is_whole'), models.CheckConstraint(condition=models.Q(('size_bytes__gte', 0)), name='adapter_size_not_negative')],
            },
        ),
        EnableRLS("Adapter", app="SELECT, INSERT, UPDATE", operator="SELECT, INSERT, UPDATE"),
        SameTenant("Adapter", "project"),
        SameTenant("Adapter", "deployment"),
        RunStatements(LOOKUP, UNDO_LOOKUP, what="Tell gateways of adapters"),
    ]
