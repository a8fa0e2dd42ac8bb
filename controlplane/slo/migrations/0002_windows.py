"""Windows of kept and missed promises, and alerts about them."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, SameTenant


class Migration(migrations.Migration):

    dependencies = [
        ('slo', '0001_initial'),
        ('tenants', '0006_key_scopes'),
    ]

    operations = [
        migrations.CreateModel(
            name='SloAlert',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('slo_class', models.CharField(max_length=16)),
                ('severity', models.CharField(help_text='page or ticket', max_length=8)),
                ('burn_rate', models.FloatField(help_text='in its long window, when it began')),
                ('window_s', models.PositiveIntegerField(help_text='the long window')),
                ('started_at', models.DateTimeField()),
                ('ended_at', models.DateTimeField(blank=True, null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='slo_alerts', to='tenants.organization')),
                ('project', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='slo_alerts', to='tenants.project')),
            ],
            options={
                'indexes': [models.Index(fields=['organization', '-started_at'], name='sloalert_newest')],
                'constraints': [models.UniqueConstraint(condition=models.Q(('ended_at__isnull', True)), fields=('project', 'slo_class'), name='sloalert_one_open')],
            },
        ),
        migrations.CreateModel(
            name='SloWindow',
            fields=[
                ('id', models.BigAutoField(primary_key=True, serialize=False)),
                ('deployment_id', models.UUIDField()),
                ('slo_class', models.CharField(max_length=16)),
                ('width_s', models.PositiveIntegerField(help_text='60 or 3600')),
                ('at', models.DateTimeField(help_text='its begin')),
                ('n', models.PositiveIntegerField()),
                ('n_good', models.PositiveIntegerField()),
                ('n_failed', models.PositiveIntegerField()),
                ('n_ttft', models.PositiveIntegerField()),
                ('n_itl', models.PositiveIntegerField()),
                ('n_deadline', models.PositiveIntegerField()),
                ('n_refused', models.PositiveIntegerField()),
                ('allowed_ppm', models.BigIntegerField(help_text='misses that the objectives allow, millionths of a request')),
                ('organization', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='tenants.organization')),
                ('project', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='tenants.project')),
            ],
            options={
                'indexes': [models.Index(fields=['width_s', 'at'], name='slowindow_oldest')],
                'constraints': [models.UniqueConstraint(fields=('organization', 'width_s', 'at', 'slo_class', 'project', 'deployment_id'), name='slowindow_unique'), models.CheckConstraint(condition=models.Q(('width_s__in', [60, 3600])), name='slowindow_width_known')],
            },
        ),
        EnableRLS("SloWindow", app="SELECT"),
        EnableRLS("SloAlert", app="SELECT"),
        SameTenant("SloAlert", "project"),
    ]
