"""Identity providers, mail domains, and how a sign-in finds them."""

import controlplane.ids
import django.db.models.deletion
import django.db.models.functions.text
from django.db import migrations, models

from importlib import import_module

from controlplane.tenants.rls import EnableRLS, RunStatements

# The audit log leaves out more secrets: sealed ones, and tokens that prove a domain.
_first = import_module("controlplane.audit.migrations.0001_initial")
_sql = _first.WRITTEN_BY_TRIGGERS
AUDIT_BEFORE = _sql[_sql.index("CREATE FUNCTION corral_audit()") : _sql.index("REVOKE ALL ON FUNCTION corral_audit()")]
AUDIT_BEFORE = AUDIT_BEFORE.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
AUDIT = AUDIT_BEFORE.replace("{" + ",".join(_first.HIDDEN) + "}", "{" + ",".join((*_first.HIDDEN, "secret", "token")) + "}")
assert AUDIT != AUDIT_BEFORE

# Who signs in belongs to no tenant yet, hence SECURITY DEFINER. What is told is no more than the sign-in page shows.
FOUND = """
CREATE FUNCTION corral_identity_provider(p_id uuid) RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT organization_id FROM identity_identityprovider WHERE id = p_id AND is_enabled
$$;
REVOKE ALL ON FUNCTION corral_identity_provider(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_identity_provider(uuid) TO corral_app, corral_operator;

CREATE FUNCTION corral_domain_providers(p_domain text) RETURNS TABLE (provider_id uuid, name text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT p.id, p.name::text
    FROM identity_domain d
    JOIN identity_identityprovider p ON p.organization_id = d.organization_id
    WHERE d.name = p_domain AND d.verified_at IS NOT NULL AND p.is_enabled
    ORDER BY p.name, p.id
$$;
REVOKE ALL ON FUNCTION corral_domain_providers(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_domain_providers(text) TO corral_app, corral_operator;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON identity_domain
    FOR EACH ROW EXECUTE FUNCTION corral_audit('domain', 'organization_id');
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON identity_identityprovider
    FOR EACH ROW EXECUTE FUNCTION corral_audit('identity_provider', 'organization_id');
"""
UNDO = """
DROP TRIGGER audit ON identity_identityprovider;
DROP TRIGGER audit ON identity_domain;
DROP FUNCTION corral_domain_providers(text);
DROP FUNCTION corral_identity_provider(uuid);
"""


class Migration(migrations.Migration):

    dependencies = [
        ('identity', '0002_sign_in_policy'),
        ('audit', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='Domain',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=253)),
                ('token', models.CharField(editable=False, help_text='what its TXT record must say', max_length=64)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('verified_at', models.DateTimeField(blank=True, null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('organization', 'name'), name='domain_claim_unique'), models.UniqueConstraint(condition=models.Q(('verified_at__isnull', False)), fields=('name',), name='domain_holder_unique'), models.CheckConstraint(condition=models.Q(('name', django.db.models.functions.text.Lower('name'))), name='domain_is_lower_case')],
            },
        ),
        migrations.CreateModel(
            name='IdentityProvider',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('kind', models.CharField(choices=[('oidc', 'Oidc'), ('saml', 'Saml')], max_length=8)),
                ('name', models.CharField(max_length=40)),
                ('is_enabled', models.BooleanField(default=True)),
                ('issuer', models.CharField(help_text='OIDC: issuer URL; SAML: entity id', max_length=500)),
                ('client_id', models.CharField(blank=True, help_text='OIDC only', max_length=191)),
                ('secret', models.BinaryField(default=b'', help_text='OIDC only; sealed (secretbox.py)')),
                ('sso_url', models.CharField(blank=True, help_text='SAML only: where sign-ins are sent', max_length=500)),
                ('certificate', models.TextField(blank=True, help_text='SAML only: base64 of what it signs with')),
                ('groups_claim', models.CharField(default='groups', help_text='claim or attribute with groups', max_length=200)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.CheckConstraint(condition=models.Q(('kind__in', ['oidc', 'saml'])), name='identityprovider_kind_known')],
            },
        ),
        RunStatements(AUDIT, AUDIT_BEFORE, what="Leave more secrets out of the audit log"),
        EnableRLS("Domain"),
        EnableRLS("IdentityProvider"),
        RunStatements(FOUND, UNDO, what="Find the provider of a sign-in; audit providers and domains"),
    ]
