"""Exports and erasures, and the two things that an erasure alone may do: delete all of a tenant, redact its audit log."""

import controlplane.ids
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements, SameTenant

ERASE = """
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON lifecycle_erasure
    FOR EACH ROW EXECUTE FUNCTION corral_audit('erasure', 'organization_id');

-- Every row of every table that has an organization, found in the catalogue so that no table is forgotten. `p_kept`:
-- table -> {column: 'erased' | 'id'}; their rows stay and these columns are overwritten.
CREATE FUNCTION corral_erase(p_organization uuid, p_kept jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    found record;
    assignments text;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM lifecycle_erasure WHERE organization_id = p_organization AND state = 'erasing') THEN
        RAISE EXCEPTION 'organization % is not being erased', p_organization USING ERRCODE = 'insufficient_privilege';
    END IF;
    FOR found IN
        SELECT c.relname AS table_name, a.attname AS column_name
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
            AND NOT a.attisdropped AND a.attnum > 0 AND c.relname <> 'tenants_organization'
            AND (a.attname = 'organization_id' OR EXISTS (
                SELECT 1 FROM pg_constraint f
                WHERE f.conrelid = c.oid AND f.contype = 'f' AND f.conkey = ARRAY[a.attnum]
                    AND f.confrelid = 'tenants_organization'::regclass
            ))
    LOOP
        IF NOT p_kept ? found.table_name THEN
            EXECUTE format('DELETE FROM %I WHERE %I = $1', found.table_name, found.column_name) USING p_organization;
        ELSE
            SELECT string_agg(format(
                '%I = ''erased''%s', key, CASE WHEN value = 'id' THEN ' || ''-'' || corral_hex(id)' ELSE '' END
            ), ', ') INTO assignments
            FROM jsonb_each_text(p_kept -> found.table_name);
            IF assignments IS NOT NULL THEN
                EXECUTE format('UPDATE %I SET %s WHERE %I = $1', found.table_name, assignments, found.column_name)
                USING p_organization;
            END IF;
        END IF;
    END LOOP;
    UPDATE tenants_organization
    SET name = 'erased', slug = 'erased-' || corral_hex(id), timezone = 'UTC', updated_at = now()
    WHERE id = p_organization;
END
$$;
REVOKE ALL ON FUNCTION corral_erase(uuid, jsonb) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_erase(uuid, jsonb) TO corral_operator;

-- Append-only but for one change: a sealed entry of an organization that is being erased loses what it said and its salt
-- and keeps the digest of them. sealing.py finds any other digest.
CREATE FUNCTION corral_audit_entry_kept() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF OLD.redacted IS NULL AND octet_length(NEW.redacted) = 32 AND NEW.changes = '{}'::jsonb AND NEW.salt IS NULL
            AND OLD.kind <> 'erasure'
            AND to_jsonb(NEW) - '{redacted,changes,salt}'::text[] = to_jsonb(OLD) - '{redacted,changes,salt}'::text[]
            AND EXISTS (
                SELECT 1 FROM lifecycle_erasure WHERE organization_id = OLD.organization_id AND state = 'erasing'
            )
            AND EXISTS (SELECT 1 FROM audit_seal WHERE entry_id = OLD.id)
        THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'audit_entry is append-only: entries are neither changed nor deleted'
        USING ERRCODE = 'insufficient_privilege';
END
$$;
DROP TRIGGER append_only ON audit_entry;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON audit_entry
    FOR EACH ROW EXECUTE FUNCTION corral_audit_entry_kept();

CREATE FUNCTION corral_redact(p_organization uuid, p_entries bigint[], p_digests bytea[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    UPDATE audit_entry e SET redacted = given.digest, changes = '{}'::jsonb, salt = NULL
    FROM unnest(p_entries, p_digests) AS given (id, digest)
    WHERE e.id = given.id AND e.organization_id = p_organization
$$;
REVOKE ALL ON FUNCTION corral_redact(uuid, bigint[], bytea[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_redact(uuid, bigint[], bytea[]) TO corral_operator;
"""
UNDO = """
DROP FUNCTION corral_redact(uuid, bigint[], bytea[]);
DROP TRIGGER append_only ON audit_entry;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON audit_entry
    FOR EACH ROW EXECUTE FUNCTION corral_append_only();
DROP FUNCTION corral_audit_entry_kept();
DROP FUNCTION corral_erase(uuid, jsonb);
DROP TRIGGER audit ON lifecycle_erasure;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('lifecycle', '0001_suspension'),
        ('audit', '0002_redaction'),
        ('tenants', '0005_management'),
    ]

    operations = [
        migrations.CreateModel(
            name='Export',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('operation_id', models.UUIDField(help_text='the long operation that writes it', null=True)),
                ('position', models.JSONField(default=dict, help_text='where the next part goes on')),
                ('n_parts', models.PositiveIntegerField(default=0)),
                ('n_rows', models.PositiveBigIntegerField(default=0)),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('expires_at', models.DateTimeField()),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='ExportPart',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('n', models.PositiveIntegerField()),
                ('data', models.BinaryField()),
                ('export', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, related_name='parts', to='lifecycle.export')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='Erasure',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('state', models.CharField(choices=[('requested', 'Requested'), ('cancelled', 'Cancelled'), ('erasing', 'Erasing'), ('erased', 'Erased')], default='requested', max_length=12)),
                ('requested_by', models.CharField(help_text='tok_…, usr_…, or the database role', max_length=64)),
                ('requested_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('due_at', models.DateTimeField(help_text='until then it can be cancelled')),
                ('quiet_until', models.DateTimeField(help_text='suspended, waiting for what still runs', null=True)),
                ('ended_at', models.DateTimeField(null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.UniqueConstraint(condition=models.Q(('state', 'cancelled'), _negated=True), fields=('organization',), name='erasure_one_at_a_time'), models.CheckConstraint(condition=models.Q(('state__in', ['requested', 'cancelled', 'erasing', 'erased'])), name='erasure_state_known')],
            },
        ),
        migrations.AddConstraint(
            model_name='export',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='export_tenant_unique'),
        ),
        migrations.AddConstraint(
            model_name='exportpart',
            constraint=models.UniqueConstraint(fields=('export', 'n'), name='exportpart_unique'),
        ),
        EnableRLS("Export", app="SELECT, INSERT, UPDATE, DELETE"),
        EnableRLS("ExportPart", app="SELECT, DELETE"),
        SameTenant("ExportPart", "export"),
        EnableRLS("Erasure", app="SELECT, INSERT, UPDATE", operator="SELECT, INSERT, UPDATE"),
        RunStatements(ERASE, UNDO, what="Erase a tenant, and redact its audit log"),
    ]
