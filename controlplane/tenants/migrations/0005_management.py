"""Service accounts, tokens of the management API, and answers kept for repeated writes."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EnableRLS, RunStatements, SameTenant

# Whose a token is must be known before a tenant is, hence SECURITY DEFINER. The digest goes out with it: the process
# that asks holds the pepper and compares.
TOKEN = """
CREATE FUNCTION corral_management_token(p_lookup text)
RETURNS TABLE (
    organization_id uuid, token_id uuid, service_account_id uuid, role text, scopes jsonb, suspended_at timestamptz,
    digest bytea
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.id, t.id, a.id, a.role::text, t.scopes, o.suspended_at, t.digest
    FROM tenants_managementtoken t
    JOIN tenants_serviceaccount a ON a.id = t.service_account_id
    JOIN tenants_organization o ON o.id = t.organization_id
    WHERE t.lookup = p_lookup AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())
        AND a.deleted_at IS NULL
$$;
REVOKE ALL ON FUNCTION corral_management_token(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_management_token(text) TO corral_app, corral_operator;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('tenants', '0004_cell_leases'),
    ]

    operations = [
        migrations.CreateModel(
            name='ServiceAccount',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=120)),
                ('role', models.CharField(choices=[('owner', 'Owner'), ('admin', 'Admin'), ('billing', 'Billing'), ('developer', 'Developer'), ('viewer', 'Viewer')], max_length=16)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('deleted_at', models.DateTimeField(blank=True, null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='service_accounts', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='ManagementToken',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=120)),
                ('scopes', models.JSONField(blank=True, help_text="permissions it is bound to; null = its role's", null=True)),
                ('lookup', models.CharField(editable=False, max_length=12, unique=True)),
                ('digest', models.BinaryField(max_length=32)),
                ('last4', models.CharField(editable=False, max_length=4)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('expires_at', models.DateTimeField(blank=True, null=True)),
                ('revoked_at', models.DateTimeField(blank=True, null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
                ('service_account', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='tokens', to='tenants.serviceaccount')),
            ],
        ),
        migrations.CreateModel(
            name='IdempotentWrite',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('caller', models.UUIDField(help_text='the management token')),
                ('key_digest', models.BinaryField(help_text='SHA-256 of the Idempotency-Key', max_length=32)),
                ('fingerprint', models.BinaryField(help_text='SHA-256 of method, path and body', max_length=32)),
                ('status', models.PositiveSmallIntegerField()),
                ('body', models.BinaryField()),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='+', to='tenants.organization')),
            ],
            options={
                'indexes': [models.Index(fields=['created_at'], name='idempotentwrite_oldest')],
                'constraints': [models.UniqueConstraint(fields=('caller', 'key_digest'), name='idempotentwrite_unique')],
            },
        ),
        migrations.AddConstraint(
            model_name='serviceaccount',
            constraint=models.UniqueConstraint(condition=models.Q(('deleted_at__isnull', True)), fields=('organization', 'name'), name='serviceaccount_name_unique'),
        ),
        migrations.AddConstraint(
            model_name='serviceaccount',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='serviceaccount_tenant_unique'),
        ),
        migrations.AddConstraint(
            model_name='serviceaccount',
            constraint=models.CheckConstraint(condition=models.Q(('role__in', ['owner', 'admin', 'billing', 'developer', 'viewer'])), name='serviceaccount_role_known'),
        ),
        migrations.AddIndex(
            model_name='managementtoken',
            index=models.Index(fields=['organization', '-created_at'], name='managementtoken_newest'),
        ),
        migrations.AddConstraint(
            model_name='managementtoken',
            constraint=models.CheckConstraint(condition=models.Q(('lookup__regex', '^[0-9A-Za-z]{12}$')), name='managementtoken_lookup_shape'),
        ),
        migrations.AddConstraint(
            model_name='managementtoken',
            constraint=models.CheckConstraint(condition=models.Q(('expires_at__isnull', True), ('expires_at__gt', models.F('created_at')), _connector='OR'), name='managementtoken_expires_later'),
        ),
        EnableRLS("ServiceAccount", app="SELECT, INSERT, UPDATE", operator=ALL),
        EnableRLS("ManagementToken", app="SELECT, INSERT, UPDATE", operator=ALL),
        EnableRLS("IdempotentWrite", app="SELECT, INSERT", operator=ALL),
        SameTenant("ManagementToken", "service_account"),
        RunStatements(TOKEN, "DROP FUNCTION corral_management_token(text)", what="Find the caller behind a token"),
    ]
