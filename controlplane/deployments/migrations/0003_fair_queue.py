"""How a deployment orders its queue, and gateways are told of it and of the weights."""

from importlib import import_module

from django.db import migrations, models

from controlplane.tenants.rls import RunStatements

_first = import_module("controlplane.deployments.migrations.0002_isolation").KEY_LOOKUP
LOOKUP_BEFORE = _first[_first.index("CREATE FUNCTION corral_key_lookup") : _first.index("REVOKE ALL")].replace(
    "CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"
)
LOOKUP_AFTER = (
    LOOKUP_BEFORE.replace("'id', corral_hex(k.id),", "'id', corral_hex(k.id),\n            'weight', k.weight,")
    .replace("'id', corral_hex(o.id),", "'id', corral_hex(o.id),\n            'weight', o.weight,")
    .replace(
        "'id', corral_hex(d.id),",
        "'id', corral_hex(d.id),\n        'queue_order', d.queue_order,"
        "\n        'locality_window_tokens', d.locality_window_tokens,",
    )
)


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0003_spent'),
        ('deployments', '0002_isolation'),
        ('tenants', '0003_fair_queue'),
    ]

    operations = [
        migrations.AddField(
            model_name='deployment',
            name='locality_window_tokens',
            field=models.PositiveIntegerField(db_default=2000, default=2000, help_text='prompt tokens by which a flow may get ahead so that a request goes where its prompt is cached'),
        ),
        migrations.AddField(
            model_name='deployment',
            name='queue_order',
            field=models.CharField(choices=[('edf', 'edf'), ('sjf', 'sjf'), ('fcfs', 'fcfs')], db_default='edf', default='edf', help_text='which request of a key goes first; between keys, projects and organizations fairness decides', max_length=8),
        ),
        migrations.AddConstraint(
            model_name='deployment',
            constraint=models.CheckConstraint(condition=models.Q(('queue_order__in', ['edf', 'sjf', 'fcfs'])), name='deployment_queue_order_known'),
        ),
        migrations.AddConstraint(
            model_name='deployment',
            constraint=models.CheckConstraint(condition=models.Q(('locality_window_tokens__lte', 1000000)), name='deployment_window_in_range'),
        ),
        RunStatements(LOOKUP_AFTER, LOOKUP_BEFORE, what="Gateways read the weights and the order"),
    ]
