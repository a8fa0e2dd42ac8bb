"""The audit log: its tables, the triggers that write it, and those that let nobody change it."""

import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements

# Every table whose rows tenants or the house set: (table, kind, column of the organization).
AUDITED = (
    ("tenants_organization", "organization", "id"),
    ("tenants_project", "project", "organization_id"),
    ("tenants_member", "member", "organization_id"),
    ("tenants_serviceaccount", "service_account", "organization_id"),
    ("tenants_managementtoken", "management_token", "organization_id"),
    ("tenants_apikey", "api_key", "organization_id"),
    ("deployments_modelversion", "model_version", "organization_id"),
    ("deployments_deployment", "deployment", "organization_id"),
    ("deployments_grant", "grant", "organization_id"),
)
# Left out of the log: secrets, and what the house itself notes down all the time.
HIDDEN = (
    "digest", "lookup", "created_at", "updated_at", "last_used_at", "phase", "last_error", "generation", "manifest",
)

WRITTEN_BY_TRIGGERS = f"""
ALTER TABLE audit_entry ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id();

CREATE FUNCTION corral_audit() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP = 'INSERT' THEN '{{}}'::jsonb ELSE to_jsonb(OLD) END;
    becomes jsonb := CASE WHEN TG_OP = 'DELETE' THEN '{{}}'::jsonb ELSE to_jsonb(NEW) END;
    it jsonb := CASE WHEN TG_OP = 'DELETE' THEN was ELSE becomes END;
    changed jsonb;
BEGIN
    SELECT coalesce(jsonb_object_agg(key, jsonb_build_array(was -> key, becomes -> key)), '{{}}'::jsonb) INTO changed
    FROM jsonb_object_keys(was || becomes) AS key
    WHERE key <> ALL ('{{{",".join(HIDDEN)}}}'::text[]) AND coalesce(was -> key, 'null') <> coalesce(becomes -> key, 'null');
    IF TG_OP = 'UPDATE' AND changed = '{{}}'::jsonb THEN
        RETURN NULL;
    END IF;
    INSERT INTO audit_entry (organization_id, actor, action, kind, thing, changes)
    VALUES (
        (it ->> TG_ARGV[1])::uuid,
        coalesce(
            nullif(current_setting('corral.actor', true), ''),
            'role ' || coalesce(nullif(current_setting('role'), 'none'), session_user)
        ),
        CASE TG_OP WHEN 'INSERT' THEN 'create' WHEN 'UPDATE' THEN 'update' ELSE 'delete' END,
        TG_ARGV[0], (it ->> 'id')::uuid, changed
    );
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_audit() FROM PUBLIC;

CREATE FUNCTION corral_append_only() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: entries are neither changed nor deleted', TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
""" + "".join(
    f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON {table} "
    "FOR EACH ROW EXECUTE FUNCTION corral_append_only();\n"
    f"CREATE TRIGGER not_emptied BEFORE TRUNCATE ON {table} EXECUTE FUNCTION corral_append_only();\n"
    for table in ("audit_entry", "audit_seal")
) + "".join(
    f"CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON {table} "
    f"FOR EACH ROW EXECUTE FUNCTION corral_audit('{kind}', '{column}');\n"
    for table, kind, column in AUDITED
)
UNDO = "".join(f"DROP TRIGGER audit ON {table};\n" for table, _, _ in AUDITED) + """
DROP FUNCTION corral_audit();
DROP TRIGGER append_only ON audit_entry;
DROP TRIGGER append_only ON audit_seal;
DROP TRIGGER not_emptied ON audit_entry;
DROP TRIGGER not_emptied ON audit_seal;
DROP FUNCTION corral_append_only();
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0005_management'),
        ('deployments', '0005_cell'),
    ]

    operations = [
        migrations.CreateModel(
            name='Entry',
            fields=[
                ('id', models.BigAutoField(primary_key=True, serialize=False)),
                ('at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('actor', models.CharField(help_text='tok_…, usr_…, or the database role', max_length=64)),
                ('action', models.CharField(help_text='create, update or delete', max_length=8)),
                ('kind', models.CharField(help_text='what was changed, for example project', max_length=40)),
                ('thing', models.UUIDField(help_text='its id')),
                ('changes', models.JSONField()),
                ('organization', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='Seal',
            fields=[
                ('id', models.BigAutoField(primary_key=True, serialize=False)),
                ('n', models.PositiveBigIntegerField()),
                ('hash', models.BinaryField(max_length=32)),
                ('sealed_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('entry', models.OneToOneField(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='seal', to='audit.entry')),
                ('organization', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.AddIndex(
            model_name='entry',
            index=models.Index(fields=['organization', '-id'], name='auditentry_newest'),
        ),
        migrations.AddConstraint(
            model_name='seal',
            constraint=models.UniqueConstraint(fields=('organization', 'n'), name='auditseal_unique'),
        ),
        EnableRLS("Entry", app="SELECT", operator="SELECT"),
        EnableRLS("Seal", app="SELECT", operator="SELECT, INSERT"),
        RunStatements(WRITTEN_BY_TRIGGERS, UNDO, what="Let triggers write the audit log, and nobody change it"),
    ]
