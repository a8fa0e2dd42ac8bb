"""The directory of an organization: its tokens, people, groups."""

import controlplane.ids
import django.db.models.deletion
import django.db.models.functions.text
from django.conf import settings
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements, SameTenant

# Who calls belongs to no tenant yet, hence SECURITY DEFINER. Found by its digest, as management tokens are
# (tenants/0009); kept under the present pepper at its use (tenants/0008).
FUNCTIONS = """
CREATE FUNCTION corral_scim_token_known(p_lookup text, p_digests text[])
RETURNS TABLE (organization_id uuid, token_id uuid, suspended_at timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.id, t.id, o.suspended_at
    FROM scim_scimtoken t
    JOIN tenants_organization o ON o.id = t.organization_id
    WHERE t.digest = ANY (ARRAY(SELECT decode(hex, 'hex') FROM unnest(p_digests) AS hex)) AND t.lookup || '' = p_lookup
        AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())
$$;
REVOKE ALL ON FUNCTION corral_scim_token_known(text, text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_scim_token_known(text, text[]) TO corral_app, corral_operator;

CREATE FUNCTION corral_scim_token_move(p_lookup text, p_old text, p_new text, p_pepper text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    WITH changed AS (
        UPDATE scim_scimtoken SET digest = decode(p_new, 'hex'), pepper = p_pepper
        WHERE lookup = p_lookup AND digest = decode(p_old, 'hex') AND length(p_new) = 64
        RETURNING 1
    )
    SELECT EXISTS (SELECT FROM changed)
$$;
REVOKE ALL ON FUNCTION corral_scim_token_move(text, text, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_scim_token_move(text, text, text, text) TO corral_app, corral_operator;
"""
AUDITED = (
    ("scim_scimtoken", "scim_token"),
    ("scim_scimuser", "scim_user"),
    ("scim_scimgroup", "scim_group"),
    ("scim_scimmembership", "scim_membership"),
)
FUNCTIONS += "".join(
    f"CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON {table} "
    f"FOR EACH ROW EXECUTE FUNCTION corral_audit('{kind}', 'organization_id');\n"
    for table, kind in AUDITED
)
UNDO = "".join(f"DROP TRIGGER audit ON {table};\n" for table, _ in AUDITED) + """
DROP FUNCTION corral_scim_token_move(text, text, text, text);
DROP FUNCTION corral_scim_token_known(text, text[]);
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0009_found_by_digest'),
        ('audit', '0001_initial'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='ScimGroup',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('display_name', models.CharField(max_length=254)),
                ('external_id', models.CharField(blank=True, max_length=254)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(help_text='also of its members; its version is made of it')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='ScimToken',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=120)),
                ('lookup', models.CharField(editable=False, max_length=12, unique=True)),
                ('digest', models.BinaryField(max_length=32)),
                ('pepper', models.CharField(editable=False, help_text='id of the one it is hashed under', max_length=8)),
                ('last4', models.CharField(editable=False, max_length=4)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('expires_at', models.DateTimeField(blank=True, null=True)),
                ('revoked_at', models.DateTimeField(blank=True, null=True)),
                ('last_used_at', models.DateTimeField(blank=True, help_text='to the minute', null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
        ),
        migrations.CreateModel(
            name='ScimUser',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('user_name', models.CharField(max_length=254)),
                ('external_id', models.CharField(blank=True, help_text="the directory's own id", max_length=254)),
                ('email', models.EmailField(max_length=254)),
                ('given_name', models.CharField(blank=True, max_length=120)),
                ('family_name', models.CharField(blank=True, max_length=120)),
                ('display_name', models.CharField(blank=True, max_length=254)),
                ('is_active', models.BooleanField(default=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(help_text='also of its groups; its version is made of it')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
                ('user', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to=settings.AUTH_USER_MODEL)),
            ],
        ),
        migrations.CreateModel(
            name='ScimMembership',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('group', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, related_name='memberships', to='scim.scimgroup')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
                ('user', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, related_name='memberships', to='scim.scimuser')),
            ],
        ),
        migrations.AddIndex(
            model_name='scimgroup',
            index=models.Index(fields=['organization', 'external_id'], name='scimgroup_external'),
        ),
        migrations.AddConstraint(
            model_name='scimgroup',
            constraint=models.UniqueConstraint(models.F('organization'), django.db.models.functions.text.Lower('display_name'), name='scimgroup_name_unique'),
        ),
        migrations.AddConstraint(
            model_name='scimgroup',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='scimgroup_tenant_unique'),
        ),
        migrations.AddIndex(
            model_name='scimtoken',
            index=models.Index(fields=['organization', '-created_at'], name='scimtoken_newest'),
        ),
        migrations.AddIndex(
            model_name='scimtoken',
            index=models.Index(fields=['digest'], name='scimtoken_digest'),
        ),
        migrations.AddConstraint(
            model_name='scimtoken',
            constraint=models.CheckConstraint(condition=models.Q(('lookup__regex', '^[0-9A-Za-z]{12}$')), name='scimtoken_lookup_shape'),
        ),
        migrations.AddConstraint(
            model_name='scimtoken',
            constraint=models.CheckConstraint(condition=models.Q(('expires_at__isnull', True), ('expires_at__gt', models.F('created_at')), _connector='OR'), name='scimtoken_expires_later'),
        ),
        migrations.AddIndex(
            model_name='scimuser',
            index=models.Index(fields=['organization', 'external_id'], name='scimuser_external'),
        ),
        migrations.AddConstraint(
            model_name='scimuser',
            constraint=models.UniqueConstraint(models.F('organization'), django.db.models.functions.text.Lower('user_name'), name='scimuser_name_unique'),
        ),
        migrations.AddConstraint(
            model_name='scimuser',
            constraint=models.UniqueConstraint(fields=('organization', 'user'), name='scimuser_user_unique'),
        ),
        migrations.AddConstraint(
            model_name='scimuser',
            constraint=models.UniqueConstraint(fields=('organization', 'id'), name='scimuser_tenant_unique'),
        ),
        migrations.AddConstraint(
            model_name='scimuser',
            constraint=models.CheckConstraint(condition=models.Q(('email', django.db.models.functions.text.Lower('email'))), name='scimuser_email_is_lower_case'),
        ),
        migrations.AddConstraint(
            model_name='scimmembership',
            constraint=models.UniqueConstraint(fields=('group', 'user'), name='scimmembership_unique'),
        ),
        EnableRLS("ScimToken"),
        EnableRLS("ScimUser"),
        EnableRLS("ScimGroup"),
        EnableRLS("ScimMembership"),
        SameTenant("ScimMembership", "group"),
        SameTenant("ScimMembership", "user"),
        RunStatements(FUNCTIONS, UNDO, what="Find a directory's token; audit directories"),
    ]
