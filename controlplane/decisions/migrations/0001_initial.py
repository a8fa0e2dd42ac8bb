"""Decisions about requests."""

import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, Grant


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0006_key_scopes'),
    ]

    operations = [
        migrations.CreateModel(
            name='DecisionMark',
            fields=[
                ('cell', models.CharField(max_length=16, primary_key=True, serialize=False)),
                ('entry_id', models.CharField(max_length=40)),
            ],
        ),
        migrations.CreateModel(
            name='RequestDecision',
            fields=[
                ('id', models.BigAutoField(primary_key=True, serialize=False)),
                ('request_id', models.UUIDField()),
                ('project_id', models.UUIDField()),
                ('api_key_id', models.UUIDField()),
                ('deployment_id', models.UUIDField(null=True)),
                ('model', models.CharField(blank=True, max_length=64)),
                ('outcome', models.CharField(choices=[('bound', 'Bound'), ('queued', 'Queued'), ('refused', 'Refused')], max_length=8)),
                ('code', models.CharField(blank=True, help_text='of the refusal', max_length=40)),
                ('status', models.PositiveSmallIntegerField(help_text='HTTP status; 0 where it was admitted')),
                ('slo_class', models.CharField(blank=True, max_length=16)),
                ('at', models.DateTimeField()),
                ('facts', models.JSONField(default=dict, help_text='inputs, predictions, alternatives: see facts.py')),
                ('organization', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='+', to='tenants.organization')),
            ],
            options={
                'indexes': [models.Index(fields=['organization', '-id'], name='requestdecision_newest'), models.Index(fields=['organization', 'request_id'], name='requestdecision_by_request'), models.Index(fields=['at'], name='requestdecision_oldest')],
            },
        ),
        EnableRLS("RequestDecision", app="SELECT"),
        Grant("DecisionMark", operator="SELECT, INSERT, UPDATE"),
    ]
