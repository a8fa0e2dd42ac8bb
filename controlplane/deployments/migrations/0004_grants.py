"""A deployment may be called by projects that were given leave, under the owner's name and at the caller's price."""

from importlib import import_module

import django.db.models.deletion
from django.db import migrations, models

import controlplane.deployments.models
import controlplane.ids
from controlplane.tenants.rls import APP, TENANT, EnableRLS, RunStatements, SameTenant

LOOKUP_BEFORE = import_module("controlplane.deployments.migrations.0003_fair_queue").LOOKUP_AFTER
# Of those shared with the caller: under the name in the grant, at the price of the same name that is in force for the
# caller, as long as deployment and owner are there. Where a name is both, the own one comes last, and the last counts.
CALLABLE = """FROM (
        SELECT own.id, own.name, own.price_version_id, 1 AS rank
        FROM deployments_deployment own WHERE own.project_id = p.id
        UNION ALL
        SELECT g.deployment_id, g.name, (
            SELECT mine.id FROM billing_priceversion mine
            WHERE mine.name = agreed.name AND mine.valid_from <= now()
                AND (mine.organization_id = k.organization_id OR mine.organization_id IS NULL)
            ORDER BY mine.organization_id NULLS LAST, mine.valid_from DESC LIMIT 1
        ), 0
        FROM deployments_grant g
        JOIN tenants_organization owner ON owner.id = g.organization_id
        JOIN deployments_deployment shared ON shared.id = g.deployment_id
        JOIN billing_priceversion agreed ON agreed.id = shared.price_version_id
        WHERE g.grantee_id = k.organization_id AND (g.project_id IS NULL OR g.project_id = p.id)
            AND owner.suspended_at IS NULL
    ) AS callable
    JOIN deployments_deployment d ON d.id = callable.id"""
LOOKUP_AFTER = (
    LOOKUP_BEFORE.replace("FROM deployments_deployment d", CALLABLE)
    .replace("'name', d.name,", "'name', callable.name,")
    .replace("v.id = d.price_version_id", "v.id = callable.price_version_id")
    .replace("WHERE d.project_id = p.id AND d.deleted_at IS NULL", "WHERE d.deleted_at IS NULL")
    .replace("ORDER BY d.name", "ORDER BY callable.rank, callable.name")
)

SHARED = f"""
CREATE POLICY granted ON deployments_grant FOR SELECT TO {APP} USING (grantee_id = {TENANT});
ALTER TABLE deployments_grant ADD CONSTRAINT deployments_grant_project_of_grantee
    FOREIGN KEY (grantee_id, project_id) REFERENCES tenants_project (organization_id, id)
    DEFERRABLE INITIALLY DEFERRED;
CREATE FUNCTION corral_note_grant() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    INSERT INTO corral_change (ref)
    VALUES ('org:' || corral_hex(CASE WHEN TG_OP = 'DELETE' THEN OLD.grantee_id ELSE NEW.grantee_id END));
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_grant() FROM PUBLIC;
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON deployments_grant
    FOR EACH ROW EXECUTE FUNCTION corral_note_grant();
"""
UNDO_SHARED = """
DROP TRIGGER note_change ON deployments_grant;
DROP FUNCTION corral_note_grant();
ALTER TABLE deployments_grant DROP CONSTRAINT deployments_grant_project_of_grantee;
DROP POLICY granted ON deployments_grant;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0003_spent'),
        ('deployments', '0003_fair_queue'),
        ('tenants', '0003_fair_queue'),
    ]

    operations = [
        migrations.CreateModel(
            name='Grant',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(help_text="the `model` that the grantee's programs send", max_length=64, validators=[controlplane.deployments.models.check_name])),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('deployment', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='grants', to='deployments.deployment')),
                ('grantee', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='grants_held', to='tenants.organization')),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='grants_given', to='tenants.organization')),
                ('project', models.ForeignKey(blank=True, db_constraint=False, help_text='only this project of the grantee; NULL: all of them', null=True, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.project')),
            ],
        ),
        migrations.AddConstraint(
            model_name='grant',
            constraint=models.UniqueConstraint(fields=('grantee', 'project', 'name'), name='grant_name_unique', nulls_distinct=False),
        ),
        migrations.AddIndex(
            model_name='grant',
            index=models.Index(fields=['organization', 'deployment'], name='grant_by_deployment'),
        ),
        EnableRLS("Grant", app="SELECT, DELETE"),
        SameTenant("Grant", "deployment"),
        RunStatements(SHARED, UNDO_SHARED, what="Who was given leave reads its grants; gateways hear of them"),
        RunStatements(LOOKUP_AFTER, LOOKUP_BEFORE, what="Gateways serve what was shared with a key's project"),
    ]
