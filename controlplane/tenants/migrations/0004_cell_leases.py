"""Which cell holds which part of a tenant's limits; what a gateway is told of it; notes when it changes."""

import controlplane.ids
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EnableRLS, Grant, RunStatements

# With a single cell nothing is divided: the answer is the lookup's own. `left_ms` is how long the lease still counts, by
# this server's clock; a cell without a lease has none.
LOOKUP = """
CREATE FUNCTION corral_key_lookup_in(p_lookup text, p_cell text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    found jsonb := corral_key_lookup(p_lookup);
    lease jsonb;
BEGIN
    IF found IS NULL OR NOT EXISTS (SELECT FROM tenants_cell WHERE name <> p_cell) THEN
        RETURN found;
    END IF;
    SELECT jsonb_build_object(
        'ppm', coalesce(max(granted) FILTER (WHERE scope = 'share'), 0),
        'left_ms', coalesce(floor(extract(epoch FROM min(expires_at) - now()) * 1000)::bigint, 0),
        'budgets', coalesce(jsonb_object_agg(scope, granted) FILTER (WHERE scope <> 'share'), '{}'::jsonb)
    ) INTO lease
    FROM tenants_celllease
    WHERE organization_id = (found -> 'organization' ->> 'id')::uuid AND cell = p_cell
        AND scope_id IN ((found -> 'key' ->> 'id')::uuid, (found -> 'project' ->> 'id')::uuid,
                         (found -> 'organization' ->> 'id')::uuid);
    RETURN found || jsonb_build_object('lease', lease);
END
$$;
REVOKE ALL ON FUNCTION corral_key_lookup_in(text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_lookup_in(text, text) TO corral_app, corral_operator;

CREATE FUNCTION corral_note_lease() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    IF TG_TABLE_NAME = 'tenants_cell' THEN
        INSERT INTO corral_change (ref) VALUES ('all');
    ELSIF TG_OP = 'INSERT' OR OLD.granted <> NEW.granted THEN
        INSERT INTO corral_change (ref) VALUES ('lim:' || replace(NEW.organization_id::text, '-', ''));
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_lease() FROM PUBLIC;
CREATE TRIGGER note_change AFTER INSERT OR DELETE ON tenants_cell
    FOR EACH ROW EXECUTE FUNCTION corral_note_lease();
CREATE TRIGGER note_change AFTER INSERT OR UPDATE ON tenants_celllease
    FOR EACH ROW EXECUTE FUNCTION corral_note_lease();
"""
UNDO_LOOKUP = """
DROP TRIGGER note_change ON tenants_celllease;
DROP TRIGGER note_change ON tenants_cell;
DROP FUNCTION corral_note_lease();
DROP FUNCTION corral_key_lookup_in(text, text);
"""


class Migration(migrations.Migration):

    dependencies = [
        ('tenants', '0003_fair_queue'),
    ]

    operations = [
        migrations.CreateModel(
            name='Cell',
            fields=[
                ('name', models.CharField(max_length=32, primary_key=True, serialize=False)),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('seen_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
        ),
        migrations.CreateModel(
            name='CellLease',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('cell', models.CharField(max_length=32)),
                ('scope', models.CharField(help_text='share, key, prj or org', max_length=8)),
                ('scope_id', models.UUIDField(help_text='of the key, project or organization')),
                ('granted', models.BigIntegerField(default=0, help_text='parts per million, or nano-dollars')),
                ('expires_at', models.DateTimeField()),
                ('before', models.BigIntegerField(default=0, help_text='granted earlier, counts until before_until')),
                ('before_until', models.DateTimeField()),
                ('n_asked', models.BigIntegerField(default=0, help_text='requests counted in the cell, as last reported')),
                ('demand', models.FloatField(default=0.0, help_text='requests per second, smoothed')),
                ('reported_at', models.DateTimeField(null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='+', to='tenants.organization')),
            ],
            options={
                'indexes': [models.Index(fields=['organization', 'cell'], name='celllease_of_tenant')],
                'constraints': [models.UniqueConstraint(fields=('scope', 'scope_id', 'cell'), name='celllease_unique'), models.CheckConstraint(condition=models.Q(('before__gte', 0), ('granted__gte', 0)), name='celllease_not_negative'), models.CheckConstraint(condition=models.Q(('scope__in', ['share', 'key', 'prj', 'org'])), name='celllease_scope_known')],
            },
        ),
        Grant("Cell", operator=ALL),
        EnableRLS("CellLease", app="SELECT"),
        RunStatements(LOOKUP, UNDO_LOOKUP, what="Tell gateways their cell's part of a tenant's limits"),
    ]
