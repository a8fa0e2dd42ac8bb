"""What each cell was leased of an end customer's money, while there are several cells."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements

# A cell asks for what a request needs: it is given half of what nobody has, or four times that, if it is more. Its own lease grows; one that
# has lapsed, with nothing running under it (p_idle), is cut anew. p_used: what the cell's Redis knows to be spent or
# held. Answers what is booked here (`spent`), the lease (`granted`, with what was spent), for how long it admits
# (`left_ms`), and what other cells have and have not used (`elsewhere`). The lock is the customer's; the leases that
# count never sum to more than the budget. A cell without a share of its tenant's limits (tenants/leases.py) gets none.
LEASE = """
CREATE FUNCTION corral_lease_end(p_project uuid, p_customer text, p_cell text, p_used bigint, p_idle boolean, p_need bigint)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    whose uuid;
    total bigint;
    asked_at timestamptz;
    others bigint;
    elsewhere bigint;
    booked bigint;
    used bigint;
    mine bigint;
    lapsed boolean;
    free bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('end customer ' || p_project || p_customer, 0));
    asked_at := clock_timestamp();
    SELECT l.organization_id, l.budget_nano INTO whose, total FROM endcustomers_endcustomerlimits l
    WHERE l.project_id = p_project AND l.customer IN (p_customer, '') ORDER BY l.customer DESC LIMIT 1;
    SELECT coalesce(sum(greatest(s.nano, l.granted)) FILTER (WHERE cell <> p_cell), 0),
        coalesce(sum(greatest(l.granted - coalesce(s.nano, 0), 0)) FILTER (WHERE cell <> p_cell), 0),
        coalesce(max(s.nano) FILTER (WHERE cell = p_cell), 0),
        coalesce(max(l.granted) FILTER (WHERE cell = p_cell), 0),
        coalesce(bool_and(l.lapsed) FILTER (WHERE cell = p_cell), true)
    INTO others, elsewhere, booked, mine, lapsed
    FROM (
        SELECT coalesce(m.cell, '') AS cell, sum(u.cost_nano)::bigint AS nano
        FROM billing_usageevent u LEFT JOIN autoscaler_machine m ON m.id = u.machine_id
        WHERE u.project_id = p_project AND u.end_customer = p_customer AND u.end_customer <> ''
        GROUP BY 1
    ) AS s FULL JOIN (
        SELECT e.cell, e.granted, e.expires_at <= asked_at AS lapsed FROM endcustomers_endcustomerlease e
        WHERE e.project_id = p_project AND e.customer = p_customer AND e.counts_until > asked_at
    ) AS l USING (cell);
    IF total IS NULL OR NOT EXISTS (
        SELECT FROM tenants_celllease c WHERE c.organization_id = whose AND c.cell = p_cell AND c.scope = 'share'
            AND c.granted > 0 AND c.expires_at > asked_at
    ) THEN
        RETURN jsonb_build_object('spent', booked, 'granted', 0, 'left_ms', 0, 'elsewhere', elsewhere);
    END IF;
    used := greatest(booked, p_used);
    IF lapsed AND p_idle THEN
        mine := used;
    END IF;
    mine := greatest(mine, used);
    free := greatest(total - others - mine, 0);
    IF mine - used < p_need THEN
        mine := mine + least(free, greatest(4 * p_need, free / 2));
    END IF;
    INSERT INTO endcustomers_endcustomerlease AS e
        (id, organization_id, project_id, customer, cell, granted, expires_at, counts_until)
    VALUES (gen_random_uuid(), whose, p_project, p_customer, p_cell, mine, asked_at + interval '65 s', asked_at + interval '965 s')
    ON CONFLICT (project_id, customer, cell) DO UPDATE SET organization_id = whose, granted = mine,
        expires_at = EXCLUDED.expires_at, counts_until = EXCLUDED.counts_until, returned_at = NULL;
    RETURN jsonb_build_object('spent', booked, 'granted', mine, 'left_ms', 60000, 'elsewhere', elsewhere);
END
$$;
REVOKE ALL ON FUNCTION corral_lease_end(uuid, text, text, bigint, boolean, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_lease_end(uuid, text, text, bigint, boolean, bigint) TO corral_app, corral_operator;
"""
UNDO_LEASE = "DROP FUNCTION corral_lease_end(uuid, text, text, bigint, boolean, bigint);"


class Migration(migrations.Migration):

    dependencies = [
        ('endcustomers', '0001_initial'),
        ('tenants', '0009_found_by_digest'),
        ('autoscaler', '0001_initial'),
        ('billing', '0006_end_customer'),
    ]

    operations = [
        migrations.CreateModel(
            name='EndCustomerLease',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('project_id', models.UUIDField()),
                ('customer', models.CharField(help_text='pseudonym', max_length=24)),
                ('cell', models.CharField(max_length=32)),
                ('granted', models.BigIntegerField(help_text='nano-dollars, those spent in the cell included')),
                ('expires_at', models.DateTimeField(help_text='the cell admits nothing under it from then on')),
                ('counts_until', models.DateTimeField(help_text='what was admitted under it has ended and is booked by then')),
                ('returned_at', models.DateTimeField(help_text='only what was spent counts since then', null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='+', to='tenants.organization')),
            ],
            options={
                'indexes': [models.Index(fields=['cell', 'expires_at'], name='endcustomerlease_lapsed')],
                'constraints': [models.UniqueConstraint(fields=('project_id', 'customer', 'cell'), name='endcustomerlease_unique'), models.CheckConstraint(condition=models.Q(('granted__gte', 0)), name='endcustomerlease_not_negative')],
            },
        ),
        EnableRLS("EndCustomerLease", app="SELECT"),
        RunStatements(LEASE, UNDO_LEASE, what="Lease end customers' money to cells"),
    ]
