"""Shadows: copies to endpoints and to second deployments, their bounds, what gateways are told of them."""

import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EditFunction, EnableRLS, RunStatements, SameTenant

# A key's record with the shadows of its deployments: of organizations whose prompts may be copied and projects that do
# not keep nothing. A shadow that is a deployment of ours sees its own project's requests only, since its tokens are
# charged to that.
LOOKUP = """
CREATE FUNCTION corral_with_shadows(p_found jsonb, p_cell text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    shadows jsonb;
BEGIN
    IF p_found IS NULL OR coalesce((p_found -> 'project' ->> 'zero_retention')::boolean, false)
        OR NOT EXISTS (
            SELECT FROM upstreams_outsideconsent c
            WHERE c.organization_id = (p_found -> 'organization' ->> 'id')::uuid)
    THEN
        RETURN p_found;
    END IF;
    SELECT jsonb_agg(jsonb_build_object(
        'id', corral_hex(u.id),
        'deployment', corral_hex(u.deployment_id),
        'organization', corral_hex(u.organization_id),
        'project', corral_hex(d.project_id),
        'name', u.name,
        'share_ppm', u.shadow_ppm,
        'rpm', u.shadow_rpm,
        'slots', u.slots,
        'budget_nano', u.shadow_budget_nano,
        'target', coalesce(corral_hex(u.target_id), ''),
        'max_model_len', coalesce((d.engine_profile ->> 'max_model_len')::integer, 2048),
        'input_nano_per_million', u.input_nano_per_million,
        'cached_nano_per_million', u.cached_nano_per_million,
        'output_nano_per_million', u.output_nano_per_million
    ) ORDER BY u.id) INTO shadows
    FROM jsonb_array_elements(p_found -> 'deployments') AS each
    JOIN upstreams_upstream u ON u.deployment_id = (each ->> 'id')::uuid
    JOIN deployments_deployment d ON d.id = u.deployment_id
    JOIN tenants_organization o ON o.id = u.organization_id
    LEFT JOIN deployments_deployment t ON t.id = u.target_id
    WHERE u.role = 'shadow' AND u.disabled_at IS NULL AND o.suspended_at IS NULL
        AND (u.target_id IS NULL OR (t.deleted_at IS NULL AND t.cell = p_cell AND t.project_id = d.project_id
            AND d.project_id = (p_found -> 'project' ->> 'id')::uuid));
    IF shadows IS NULL THEN
        RETURN p_found;
    END IF;
    RETURN p_found || jsonb_build_object('shadows', shadows);
END
$$;
REVOKE ALL ON FUNCTION corral_with_shadows(jsonb, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_with_shadows(jsonb, text) TO corral_app, corral_operator;

-- What copies to a shadow have cost since an instant: of an endpoint at its rates, of a deployment at its price.
CREATE FUNCTION corral_shadow_spent(p_upstream uuid, p_from_ms bigint) RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT jsonb_build_object(p_from_ms, coalesce((
        SELECT sum(d.cost_nano) FROM upstreams_upstreamday d
        WHERE d.organization_id = u.organization_id AND d.upstream_id = u.id
            AND d.day >= (to_timestamp(p_from_ms / 1000) AT TIME ZONE 'UTC')::date), 0)::bigint + coalesce((
        SELECT sum(s.cost_nano) FROM billing_spend s
        WHERE s.api_key_id = u.id AND s.quarter >= to_timestamp(p_from_ms / 1000)), 0)::bigint)
    FROM upstreams_upstream u WHERE u.id = p_upstream
$$;
REVOKE ALL ON FUNCTION corral_shadow_spent(uuid, bigint) FROM PUBLIC;

CREATE FUNCTION corral_note_shadow() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.role = 'shadow' THEN
        INSERT INTO corral_change (ref) VALUES ('dep:' || corral_hex(OLD.deployment_id));
    ELSIF TG_OP <> 'DELETE' AND NEW.role = 'shadow' THEN
        INSERT INTO corral_change (ref) VALUES ('dep:' || corral_hex(NEW.deployment_id));
    END IF;
    RETURN NULL;
END
$$;
-- Consent is taken back at once: what is cached of the organization's keys is not served again before it was read.
CREATE FUNCTION corral_note_consent() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    INSERT INTO corral_change (ref)
    VALUES ('org:' || corral_hex(CASE WHEN TG_OP = 'DELETE' THEN OLD.organization_id ELSE NEW.organization_id END));
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_shadow(), corral_note_consent() FROM PUBLIC;
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON upstreams_upstream
    FOR EACH ROW EXECUTE FUNCTION corral_note_shadow();
CREATE TRIGGER note_change AFTER INSERT OR DELETE ON upstreams_outsideconsent
    FOR EACH ROW EXECUTE FUNCTION corral_note_consent();
"""
UNDO = """
DROP TRIGGER note_change ON upstreams_outsideconsent;
DROP TRIGGER note_change ON upstreams_upstream;
DROP FUNCTION corral_note_consent();
DROP FUNCTION corral_note_shadow();
DROP FUNCTION corral_shadow_spent(uuid, bigint);
DROP FUNCTION corral_with_shadows(jsonb, text);
"""
SPENT = "corral_budget_spent(uuid, bigint, bigint, bigint, text)"
BUDGET = "SELECT * INTO b FROM budgets_budget WHERE id = p_budget;\n"
OR_SHADOW = """    IF NOT FOUND THEN -- the day of a shadow is counted like a budget's window
        RETURN coalesce(corral_shadow_spent(p_budget, p_from_ms), '{}'::jsonb);
    END IF;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('adapters', '0002_budgets'),
        ('billing', '0007_counted_by'),
        ('budgets', '0001_initial'),
        ('deployments', '0009_config'),
        ('tenants', '0009_found_by_digest'),
        ('upstreams', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='ShadowSkip',
            fields=[
                ('pk', models.CompositePrimaryKey('organization_id', 'upstream_id', 'day', 'reason', blank=True, editable=False, primary_key=True, serialize=False)),
                ('upstream_id', models.UUIDField()),
                ('day', models.DateField()),
                ('reason', models.CharField(help_text='controlplane/upstreams/wire.py: Skipped', max_length=12)),
                ('n', models.BigIntegerField(default=0)),
                ('organization', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.AddField(
            model_name='shadowresult',
            name='finish_reason',
            field=models.CharField(blank=True, max_length=12),
        ),
        migrations.AddField(
            model_name='shadowresult',
            name='itl_us',
            field=models.PositiveIntegerField(help_text='mean gap between tokens, microseconds', null=True),
        ),
        migrations.AddField(
            model_name='shadowresult',
            name='own_finish_reason',
            field=models.CharField(blank=True, max_length=12),
        ),
        migrations.AddField(
            model_name='shadowresult',
            name='own_itl_us',
            field=models.PositiveIntegerField(null=True),
        ),
        migrations.AddField(
            model_name='upstream',
            name='shadow_budget_nano',
            field=models.BigIntegerField(default=1000000000, help_text='of a shadow: most that copies may cost in a UTC day, nano-dollars'),
        ),
        migrations.AddField(
            model_name='upstream',
            name='shadow_rpm',
            field=models.PositiveIntegerField(default=60, help_text='of a shadow: most copies a minute'),
        ),
        migrations.AddField(
            model_name='upstream',
            name='target',
            field=models.ForeignKey(blank=True, db_constraint=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='deployments.deployment'),
        ),
        migrations.AlterField(
            model_name='shadowresult',
            name='first_token_ms',
            field=models.PositiveIntegerField(help_text='NULL where the caller did not stream', null=True),
        ),
        migrations.AlterField(
            model_name='shadowresult',
            name='is_same',
            field=models.BooleanField(help_text='letter for letter; NULL unless the request was greedy', null=True),
        ),
        migrations.AlterField(
            model_name='upstream',
            name='base_url',
            field=models.CharField(blank=True, help_text='up to and with /v1', max_length=2000),
        ),
        migrations.AlterField(
            model_name='upstream',
            name='model',
            field=models.CharField(blank=True, help_text='what the endpoint calls it', max_length=200),
        ),
        migrations.AddConstraint(
            model_name='upstream',
            constraint=models.CheckConstraint(condition=models.Q(('shadow_budget_nano__gte', 0)), name='upstream_budget_not_negative'),
        ),
        migrations.AddConstraint(
            model_name='upstream',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('target', None), models.Q(('base_url', ''), _negated=True)), models.Q(('base_url', ''), ('role', 'shadow'), ('target__isnull', False)), _connector='OR'), name='upstream_one_destination'),
        ),
        EnableRLS("ShadowSkip", app="SELECT", operator=ALL),
        SameTenant("Upstream", "target"),
        RunStatements(LOOKUP, UNDO, what="Gateways are told of shadows, and of consent that is given or taken back"),
        EditFunction(SPENT, BUDGET, BUDGET + OR_SHADOW, what="What copies cost is seeded like a budget"),
    ]
