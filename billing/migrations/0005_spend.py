"""Sums per key and quarter of an hour, kept by a trigger: what budgets with windows are read from."""

import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements

# Of the whole statement at once (intake books up to a thousand events in one), in the order of the key, so that two
# intakes never wait for each other crosswise. Quarters, because every time zone's midnight falls on one.
SUM_UP = """
CREATE FUNCTION corral_quarter(p_at timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT to_timestamp(floor(extract(epoch FROM p_at) / 900) * 900) $$;

CREATE FUNCTION corral_sum_up_spend() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    INSERT INTO billing_spend AS s
        (organization_id, project_id, api_key_id, model, cell, quarter, cost_nano, n_requests)
    SELECT u.organization_id, u.project_id, u.api_key_id, u.model, coalesce(m.cell, ''), corral_quarter(u.admitted_at),
        sum(u.cost_nano), count(*)
    FROM booked u LEFT JOIN autoscaler_machine m ON m.id = u.machine_id
    GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6
    ON CONFLICT (organization_id, project_id, api_key_id, model, cell, quarter) DO UPDATE
        SET cost_nano = s.cost_nano + excluded.cost_nano, n_requests = s.n_requests + excluded.n_requests;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_sum_up_spend() FROM PUBLIC;
CREATE TRIGGER sum_up AFTER INSERT ON billing_usageevent REFERENCING NEW TABLE AS booked
    FOR EACH STATEMENT EXECUTE FUNCTION corral_sum_up_spend();

INSERT INTO billing_spend (organization_id, project_id, api_key_id, model, cell, quarter, cost_nano, n_requests)
SELECT u.organization_id, u.project_id, u.api_key_id, u.model, coalesce(m.cell, ''), corral_quarter(u.admitted_at),
    sum(u.cost_nano), count(*)
FROM billing_usageevent u LEFT JOIN autoscaler_machine m ON m.id = u.machine_id
GROUP BY 1, 2, 3, 4, 5, 6;
"""
UNDO_SUM_UP = """
DROP TRIGGER sum_up ON billing_usageevent;
DROP FUNCTION corral_sum_up_spend();
DROP FUNCTION corral_quarter(timestamptz);
"""


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0004_spent_in_cell'),
        ('tenants', '0005_management'),
        ('autoscaler', '0004_notice'),
    ]

    operations = [
        migrations.CreateModel(
            name='Spend',
            fields=[
                ('pk', models.CompositePrimaryKey('organization_id', 'project_id', 'api_key_id', 'model', 'cell', 'quarter', blank=True, editable=False, primary_key=True, serialize=False)),
                ('project_id', models.UUIDField()),
                ('api_key_id', models.UUIDField()),
                ('model', models.CharField(max_length=64)),
                ('cell', models.CharField(help_text='empty where the machine is not known', max_length=32)),
                ('quarter', models.DateTimeField(help_text='its start')),
                ('cost_nano', models.BigIntegerField()),
                ('n_requests', models.BigIntegerField()),
                ('organization', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='tenants.organization')),
            ],
            options={
                'indexes': [models.Index(fields=['api_key_id', 'quarter'], name='spend_of_key'), models.Index(fields=['quarter'], name='spend_latest')],
            },
        ),
        EnableRLS("Spend", app="SELECT", operator="SELECT"),
        RunStatements(SUM_UP, UNDO_SUM_UP, what="Sum up what was booked"),
    ]
