"""What organizations ask of a sign-in; the rights of the web process on allauth's tables; the cache that it counts in."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import ALL, EnableRLS, Grant, RunStatements

# Asked for a user of several organizations, before one of them is entered, hence SECURITY DEFINER.
POLICIES = """
CREATE FUNCTION corral_user_sign_in_policies(p_user_id uuid)
RETURNS TABLE (organization_id uuid, require_mfa boolean, require_sso boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT p.organization_id, p.require_mfa, p.require_sso
    FROM identity_signinpolicy p
    JOIN tenants_member m ON m.organization_id = p.organization_id
    WHERE m.user_id = p_user_id
$$;
REVOKE ALL ON FUNCTION corral_user_sign_in_policies(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_user_sign_in_policies(uuid) TO corral_app, corral_operator;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON identity_signinpolicy
    FOR EACH ROW EXECUTE FUNCTION corral_audit('sign_in_policy', 'organization_id');

-- Django's database cache (settings.CACHES): counters of attempts and codes that were used.
CREATE TABLE identity_cache (cache_key varchar(255) PRIMARY KEY, value text NOT NULL, expires timestamptz NOT NULL);
CREATE INDEX identity_cache_expires ON identity_cache (expires);
GRANT SELECT, INSERT, UPDATE, DELETE ON identity_cache TO corral_app, corral_operator;
"""
UNDO = """
DROP TABLE identity_cache;
DROP TRIGGER audit ON identity_signinpolicy;
DROP FUNCTION corral_user_sign_in_policies(uuid);
"""


class Migration(migrations.Migration):

    dependencies = [
        ('identity', '0001_initial'),
        ('tenants', '0005_management'),
        ('account', '0009_emailaddress_unique_primary_email'),
        ('mfa', '0003_authenticator_type_uniq'),
        ('socialaccount', '0006_alter_socialaccount_extra_data'),
        ('usersessions', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='SignInPolicy',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('require_mfa', models.BooleanField(default=False)),
                ('require_sso', models.BooleanField(default=False)),
                ('just_in_time', models.BooleanField(default=True, help_text='who signs in by its provider becomes a member, if they are none')),
                ('default_role', models.CharField(choices=[('owner', 'Owner'), ('admin', 'Admin'), ('billing', 'Billing'), ('developer', 'Developer'), ('viewer', 'Viewer')], default='viewer', max_length=16)),
                ('group_roles', models.JSONField(blank=True, default=dict, help_text='name of a group at the provider -> role; the highest counts')),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('organization', models.OneToOneField(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.CheckConstraint(condition=models.Q(('default_role__in', ['owner', 'admin', 'billing', 'developer', 'viewer'])), name='signinpolicy_role_known')],
            },
        ),
        EnableRLS("SignInPolicy", app="SELECT, INSERT, UPDATE", operator=ALL),
        # A person's, not a tenant's: rows are found by the user who signs in. We verify addresses by invitation or
        # domain, so allauth's list of them stays empty and is only read; its table of providers is not used at all.
        Grant("EmailAddress", app_label="account", app="SELECT", operator=ALL),
        Grant("Authenticator", app_label="mfa", app=ALL, operator=ALL),
        Grant("UserSession", app_label="usersessions", app=ALL, operator=ALL),
        Grant("SocialAccount", app_label="socialaccount", app=ALL, operator=ALL),
        Grant("SocialToken", app_label="socialaccount", operator=ALL),
        RunStatements(POLICIES, UNDO, what="Look up what a user's organizations ask; the cache"),
    ]
