"""Endpoints, the outbox of events, and deliveries."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EnableRLS, RunStatements, SameTenant

AUDITED = """
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON webhooks_endpoint
    FOR EACH ROW EXECUTE FUNCTION corral_audit('webhook', 'organization_id');
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0005_management'),
        ('audit', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='Endpoint',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('url', models.CharField(max_length=2000)),
                ('description', models.CharField(blank=True, max_length=200)),
                ('events', models.JSONField(blank=True, default=list, help_text='names of kinds; empty = all')),
                ('rotated_at', models.DateTimeField(blank=True, help_text='when its secret was replaced', null=True)),
                ('disabled_at', models.DateTimeField(blank=True, null=True)),
                ('disabled_reason', models.CharField(blank=True, max_length=300)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='Event',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('kind', models.CharField(max_length=40)),
                ('data', models.JSONField()),
                ('fence', models.CharField(blank=True, max_length=120, null=True)),
                ('at', models.DateTimeField(auto_now_add=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='Delivery',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('email', models.EmailField(blank=True, max_length=254)),
                ('state', models.CharField(choices=[('pending', 'Pending'), ('delivered', 'Delivered'), ('failed', 'Failed')], default='pending', max_length=10)),
                ('n_attempts', models.PositiveIntegerField(default=0)),
                ('next_at', models.DateTimeField(help_text='when to try, or until when somebody is at it')),
                ('last_status', models.PositiveSmallIntegerField(help_text='of the latest answer', null=True)),
                ('last_error', models.CharField(blank=True, max_length=300)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('delivered_at', models.DateTimeField(null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
                ('endpoint', models.ForeignKey(db_constraint=False, null=True, on_delete=django.db.models.deletion.CASCADE, related_name='deliveries', to='webhooks.endpoint')),
                ('event', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, related_name='deliveries', to='webhooks.event')),
            ],
        ),
        migrations.CreateModel(
            name='EndpointState',
            fields=[
                ('endpoint', models.OneToOneField(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, primary_key=True, related_name='kept', serialize=False, to='webhooks.endpoint')),
                ('sealed_secret', models.BinaryField()),
                ('sealed_secret_before', models.BinaryField(null=True)),
                ('secret_before_until', models.DateTimeField(help_text='both secrets sign until then', null=True)),
                ('failing_since', models.DateTimeField(help_text='first failure since something was delivered', null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.AddConstraint(
            model_name='endpoint',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='webhookendpoint_tenant_unique'),
        ),
        migrations.AddIndex(
            model_name='event',
            index=models.Index(fields=['at'], name='event_oldest'),
        ),
        migrations.AddConstraint(
            model_name='event',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='event_tenant_unique'),
        ),
        migrations.AddConstraint(
            model_name='event',
            constraint=models.UniqueConstraint(condition=models.Q(('fence__isnull', False)), fields=('organization', 'fence'), name='event_once'),
        ),
        migrations.AddIndex(
            model_name='delivery',
            index=models.Index(condition=models.Q(('state', 'pending')), fields=['next_at'], name='delivery_due'),
        ),
        migrations.AddIndex(
            model_name='delivery',
            index=models.Index(fields=['endpoint', '-id'], name='delivery_of_endpoint'),
        ),
        migrations.AddConstraint(
            model_name='delivery',
            constraint=models.UniqueConstraint(condition=models.Q(('email', '')), fields=('event', 'endpoint'), name='delivery_once'),
        ),
        migrations.AddConstraint(
            model_name='delivery',
            constraint=models.UniqueConstraint(condition=models.Q(('email', ''), _negated=True), fields=('event', 'email'), name='delivery_mail_once'),
        ),
        migrations.AddConstraint(
            model_name='delivery',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('email', ''), ('endpoint__isnull', False)), models.Q(('endpoint__isnull', True), models.Q(('email', ''), _negated=True)), _connector='OR'), name='delivery_one_receiver'),
        ),
        EnableRLS("Endpoint", app=ALL, operator=ALL),
        EnableRLS("EndpointState", app=ALL, operator=ALL),
        EnableRLS("Event", app="SELECT, INSERT", operator=ALL),
        EnableRLS("Delivery", app=ALL, operator=ALL),
        SameTenant("EndpointState", "endpoint"),
        SameTenant("Delivery", "event"),
        SameTenant("Delivery", "endpoint"),
        RunStatements(AUDITED, "DROP TRIGGER audit ON webhooks_endpoint", what="Endpoints in the audit log"),
    ]
