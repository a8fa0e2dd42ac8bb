"""A deployment lives in one cell: that cell's autoscaler scales it, and only its gateways are told of it."""

from importlib import import_module

from django.db import migrations, models

import controlplane.deployments.models
from controlplane.tenants.rls import RunStatements

LOOKUP_BEFORE = import_module("controlplane.deployments.migrations.0004_grants").LOOKUP_AFTER
LOOKUP_AFTER = LOOKUP_BEFORE.replace("'name', callable.name,", "'name', callable.name,\n        'cell', d.cell,")

_first = import_module("controlplane.tenants.migrations.0004_cell_leases").LOOKUP
IN_CELL_BEFORE = _first[: _first.index("REVOKE ALL")].replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
IN_CELL_AFTER = IN_CELL_BEFORE.replace(
    "BEGIN\n",
    """BEGIN
    IF found IS NOT NULL THEN
        found := jsonb_set(found, '{deployments}', coalesce((
            SELECT jsonb_agg(served ORDER BY n)
            FROM jsonb_array_elements(found -> 'deployments') WITH ORDINALITY AS each (served, n)
            WHERE served ->> 'cell' = p_cell
        ), '[]'::jsonb));
    END IF;
""",
    1,
)


class Migration(migrations.Migration):

    dependencies = [
        ('deployments', '0004_grants'),
        ('tenants', '0004_cell_leases'),
    ]

    operations = [
        migrations.AddField(
            model_name='deployment',
            name='cell',
            field=models.CharField(default=controlplane.deployments.models.this_cell, help_text='where it is served', max_length=16),
        ),
        migrations.RemoveConstraint(model_name='deployment', name='deployment_name_unique'),
        migrations.AddConstraint(
            model_name='deployment',
            constraint=models.UniqueConstraint(condition=models.Q(('deleted_at__isnull', True)), fields=('project', 'name', 'cell'), name='deployment_name_unique'),
        ),
        migrations.RemoveConstraint(model_name='grant', name='grant_name_unique'),
        migrations.AddConstraint(
            model_name='grant',
            constraint=models.UniqueConstraint(fields=('deployment', 'grantee', 'project'), name='grant_unique', nulls_distinct=False),
        ),
        RunStatements(LOOKUP_AFTER, LOOKUP_BEFORE, what="Gateways are told where a deployment lives"),
        RunStatements(IN_CELL_AFTER, IN_CELL_BEFORE, what="Gateways serve what lives in their cell"),
    ]
