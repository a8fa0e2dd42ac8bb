"""Invitations, and how the holder of a token finds its offer."""

import controlplane.ids
import django.db.models.deletion
import django.db.models.functions.text
from django.conf import settings
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EnableRLS, RunStatements

# Whoever holds a token belongs to no tenant yet, hence SECURITY DEFINER.
OFFER = """
CREATE FUNCTION corral_invitation(p_digest bytea)
RETURNS TABLE (
    organization_id uuid, invitation_id uuid, organization_name text, email text, role text, status text,
    is_suspended boolean
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.id, i.id, o.name::text, i.email::text, i.role::text,
        CASE
            WHEN i.accepted_at IS NOT NULL THEN 'accepted'
            WHEN i.revoked_at IS NOT NULL THEN 'revoked'
            WHEN i.expires_at <= now() THEN 'expired'
            ELSE 'open'
        END,
        o.suspended_at IS NOT NULL
    FROM identity_invitation i
    JOIN tenants_organization o ON o.id = i.organization_id
    WHERE i.digest = p_digest
$$;
REVOKE ALL ON FUNCTION corral_invitation(bytea) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_invitation(bytea) TO corral_app, corral_operator;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON identity_invitation
    FOR EACH ROW EXECUTE FUNCTION corral_audit('invitation', 'organization_id');
"""
UNDO = """
DROP TRIGGER audit ON identity_invitation;
DROP FUNCTION corral_invitation(bytea);
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0005_management'),
        ('audit', '0001_initial'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='Invitation',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('email', models.EmailField(max_length=254)),
                ('role', models.CharField(choices=[('owner', 'Owner'), ('admin', 'Admin'), ('billing', 'Billing'), ('developer', 'Developer'), ('viewer', 'Viewer')], max_length=16)),
                ('digest', models.BinaryField(max_length=32, unique=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('expires_at', models.DateTimeField()),
                ('sent_at', models.DateTimeField(blank=True, null=True)),
                ('accepted_at', models.DateTimeField(blank=True, null=True)),
                ('revoked_at', models.DateTimeField(blank=True, null=True)),
                ('accepted_by', models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to=settings.AUTH_USER_MODEL)),
                ('invited_by', models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to=settings.AUTH_USER_MODEL)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.UniqueConstraint(condition=models.Q(('accepted_at__isnull', True), ('revoked_at__isnull', True)), fields=('organization', 'email'), name='invitation_open_unique'), models.CheckConstraint(condition=models.Q(('email', django.db.models.functions.text.Lower('email'))), name='invitation_email_is_lower_case'), models.CheckConstraint(condition=models.Q(('role__in', ['owner', 'admin', 'billing', 'developer', 'viewer'])), name='invitation_role_known'), models.CheckConstraint(condition=models.Q(('accepted_at__isnull', True), ('revoked_at__isnull', True), _connector='OR'), name='invitation_accepted_or_revoked')],
            },
        ),
        EnableRLS("Invitation", app="SELECT, INSERT, UPDATE", operator=ALL),
        RunStatements(OFFER, UNDO, what="Find the offer behind a token; audit invitations"),
    ]
