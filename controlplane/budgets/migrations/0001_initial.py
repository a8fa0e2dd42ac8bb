"""Budgets with windows and their alerts; what a gateway is told of them; what was spent under one."""

import controlplane.budgets.models
import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EnableRLS, RunStatements, SameTenant

# A key's record with the hard budgets that it falls under, those of its project and organization included. While there
# are several cells the limit is this cell's part of it (tenants/leases.py): 0 until it has one.
LOOKUP = """
CREATE FUNCTION corral_with_budgets(p_found jsonb, p_cell text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    budgets jsonb;
    several boolean;
BEGIN
    IF p_found IS NULL THEN
        RETURN NULL;
    END IF;
    several := EXISTS (SELECT FROM tenants_cell WHERE name <> p_cell);
    SELECT jsonb_agg(jsonb_build_object(
        'id', corral_hex(b.id),
        'name', b.name,
        'scope', CASE WHEN b.api_key_id IS NOT NULL THEN 'key' WHEN b.project_id IS NOT NULL THEN 'prj' ELSE 'org' END,
        'limit_nano', CASE WHEN NOT several THEN b.limit_nano ELSE coalesce((
            SELECT granted FROM tenants_celllease l WHERE l.scope_id = b.id AND l.cell = p_cell AND l.scope <> 'share'
        ), 0) END,
        'model', b.model,
        'period', b.period,
        'rolling_hours', b.rolling_hours,
        'timezone', o.timezone
    ) ORDER BY b.id) INTO budgets
    FROM budgets_budget b JOIN tenants_organization o ON o.id = b.organization_id
    WHERE b.hard AND b.organization_id = (p_found -> 'organization' ->> 'id')::uuid
        AND (b.project_id IS NULL OR b.project_id = (p_found -> 'project' ->> 'id')::uuid)
        AND (b.api_key_id IS NULL OR b.api_key_id = (p_found -> 'key' ->> 'id')::uuid);
    IF budgets IS NULL THEN
        RETURN p_found;
    END IF;
    RETURN p_found || jsonb_build_object('budgets', budgets);
END
$$;
REVOKE ALL ON FUNCTION corral_with_budgets(jsonb, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_with_budgets(jsonb, text) TO corral_app, corral_operator;

-- What was booked under a budget for requests admitted from p_from_ms on and before p_until_ms, by the start of each
-- step of p_step_ms (0: in all, under p_from_ms); of one cell, or of all where p_cell is empty. Whole quarters of an hour.
CREATE FUNCTION corral_budget_spent(p_budget uuid, p_from_ms bigint, p_until_ms bigint, p_step_ms bigint, p_cell text)
RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    b budgets_budget;
    since timestamptz := to_timestamp(p_from_ms / 1000);
    until timestamptz := to_timestamp(p_until_ms / 1000);
    sums jsonb;
BEGIN
    SELECT * INTO b FROM budgets_budget WHERE id = p_budget;
    -- One branch per subject, so that each is planned with its own index.
    IF b.api_key_id IS NOT NULL THEN
        SELECT jsonb_object_agg(step, spent) INTO sums FROM (
            SELECT CASE p_step_ms WHEN 0 THEN p_from_ms ELSE corral_ms(s.quarter) / p_step_ms * p_step_ms END AS step,
                sum(s.cost_nano)::bigint AS spent
            FROM billing_spend s
            WHERE s.api_key_id = b.api_key_id AND s.quarter >= since AND s.quarter < until
                AND (b.model = '' OR s.model = b.model) AND (p_cell = '' OR s.cell = p_cell)
            GROUP BY 1
        ) AS steps;
    ELSIF b.project_id IS NOT NULL THEN
        SELECT jsonb_object_agg(step, spent) INTO sums FROM (
            SELECT CASE p_step_ms WHEN 0 THEN p_from_ms ELSE corral_ms(s.quarter) / p_step_ms * p_step_ms END AS step,
                sum(s.cost_nano)::bigint AS spent
            FROM billing_spend s
            WHERE s.organization_id = b.organization_id AND s.project_id = b.project_id AND s.quarter >= since AND s.quarter < until
                AND (b.model = '' OR s.model = b.model) AND (p_cell = '' OR s.cell = p_cell)
            GROUP BY 1
        ) AS steps;
    ELSE
        SELECT jsonb_object_agg(step, spent) INTO sums FROM (
            SELECT CASE p_step_ms WHEN 0 THEN p_from_ms ELSE corral_ms(s.quarter) / p_step_ms * p_step_ms END AS step,
                sum(s.cost_nano)::bigint AS spent
            FROM billing_spend s
            WHERE s.organization_id = b.organization_id AND s.quarter >= since AND s.quarter < until
                AND (b.model = '' OR s.model = b.model) AND (p_cell = '' OR s.cell = p_cell)
            GROUP BY 1
        ) AS steps;
    END IF;
    RETURN coalesce(sums, '{}'::jsonb);
END
$$;
REVOKE ALL ON FUNCTION corral_budget_spent(uuid, bigint, bigint, bigint, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_budget_spent(uuid, bigint, bigint, bigint, text) TO corral_app, corral_operator;

CREATE FUNCTION corral_note_budget() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    it budgets_budget := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    INSERT INTO corral_change (ref) VALUES (
        CASE
            WHEN it.api_key_id IS NOT NULL
            THEN 'key:' || coalesce((SELECT lookup FROM tenants_apikey WHERE id = it.api_key_id), '')
            WHEN it.project_id IS NOT NULL THEN 'prj:' || corral_hex(it.project_id)
            ELSE 'lim:' || corral_hex(it.organization_id)
        END);
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_budget() FROM PUBLIC;
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON budgets_budget
    FOR EACH ROW EXECUTE FUNCTION corral_note_budget();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON budgets_budget
    FOR EACH ROW EXECUTE FUNCTION corral_audit('budget', 'organization_id');
"""
UNDO_LOOKUP = """
DROP TRIGGER audit ON budgets_budget;
DROP TRIGGER note_change ON budgets_budget;
DROP FUNCTION corral_note_budget();
DROP FUNCTION corral_budget_spent(uuid, bigint, bigint, bigint, text);
DROP FUNCTION corral_with_budgets(jsonb, text);
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0005_management'),
        ('deployments', '0002_isolation'),
        ('audit', '0001_initial'),
        ('billing', '0005_spend'),
    ]

    operations = [
        migrations.CreateModel(
            name='Budget',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('model', models.CharField(blank=True, help_text='deployment name; empty = all', max_length=64)),
                ('name', models.CharField(max_length=120)),
                ('limit_nano', models.BigIntegerField(help_text='money per window, nano-dollars')),
                ('hard', models.BooleanField(default=True, help_text='refuses; a soft budget only alerts')),
                ('period', models.CharField(choices=[('total', 'total'), ('day', 'day'), ('week', 'week'), ('month', 'month'), ('rolling', 'rolling')], max_length=8)),
                ('rolling_hours', models.PositiveIntegerField(blank=True, help_text='length of a rolling window', null=True)),
                ('thresholds', models.JSONField(blank=True, default=controlplane.budgets.models.default_thresholds, help_text='percent of the limit, ascending')),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('api_key', models.ForeignKey(blank=True, db_constraint=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.apikey')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='budgets', to='tenants.organization')),
                ('project', models.ForeignKey(blank=True, db_constraint=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.project')),
            ],
        ),
        migrations.CreateModel(
            name='BudgetAlert',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('window_start', models.DateTimeField(help_text='of a rolling budget: the day it was crossed on')),
                ('threshold', models.PositiveSmallIntegerField(help_text='percent of the limit')),
                ('spent_nano', models.BigIntegerField(help_text='when it was noticed')),
                ('limit_nano', models.BigIntegerField()),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('budget', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, related_name='alerts', to='budgets.budget')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.AddIndex(
            model_name='budget',
            index=models.Index(condition=models.Q(('api_key__isnull', False)), fields=['api_key'], name='budget_of_key'),
        ),
        migrations.AddIndex(
            model_name='budget',
            index=models.Index(condition=models.Q(('project__isnull', False)), fields=['project'], name='budget_of_project'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='budget_tenant_unique'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('limit_nano__gte', 0)), name='budget_limit_not_negative'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('project__isnull', True), ('api_key__isnull', True), _connector='OR'), name='budget_one_subject'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('period__in', ['total', 'day', 'week', 'month', 'rolling'])), name='budget_period_known'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('period', 'rolling'), ('rolling_hours__gte', 1), ('rolling_hours__lte', 2160)), models.Q(models.Q(('period', 'rolling'), _negated=True), ('rolling_hours__isnull', True)), _connector='OR'), name='budget_rolling_has_hours'),
        ),
        migrations.AddConstraint(
            model_name='budgetalert',
            constraint=models.UniqueConstraint(fields=('budget', 'window_start', 'threshold'), name='budgetalert_once'),
        ),
        EnableRLS("Budget", app=ALL, operator=ALL),
        EnableRLS("BudgetAlert", app="SELECT, DELETE", operator=ALL),
        SameTenant("Budget", "project"),
        SameTenant("Budget", "api_key"),
        SameTenant("BudgetAlert", "budget"),
        RunStatements(LOOKUP, UNDO_LOOKUP, what="Tell gateways of budgets, and what was spent under them"),
    ]
