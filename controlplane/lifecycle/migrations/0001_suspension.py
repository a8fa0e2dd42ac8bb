"""Suspensions, and the notes by which gateways forget the deployments of a suspended owner."""

import controlplane.ids
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements

# Keys of others have cached what they may call of this organization: they are read again, as when a grant changes
# (deployments/0004). Its own keys are noted by tenants/0002.
NOTES = """
CREATE FUNCTION corral_note_suspension() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    INSERT INTO corral_change (ref)
    SELECT DISTINCT 'org:' || corral_hex(grantee_id) FROM deployments_grant WHERE organization_id = NEW.id;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_suspension() FROM PUBLIC;
CREATE TRIGGER note_suspension AFTER UPDATE OF suspended_at ON tenants_organization
    FOR EACH ROW WHEN (OLD.suspended_at IS DISTINCT FROM NEW.suspended_at) EXECUTE FUNCTION corral_note_suspension();

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON lifecycle_suspension
    FOR EACH ROW EXECUTE FUNCTION corral_audit('suspension', 'organization_id');
"""
UNDO = """
DROP TRIGGER audit ON lifecycle_suspension;
DROP TRIGGER note_suspension ON tenants_organization;
DROP FUNCTION corral_note_suspension();
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0005_management'),
        ('deployments', '0005_cell'),
        ('audit', '0001_initial'),
    ]

    operations = [
        migrations.CreateModel(
            name='Suspension',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('reason', models.CharField(help_text='told to its members', max_length=300)),
                ('began_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('lifted_at', models.DateTimeField(blank=True, null=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
            ],
            options={
                'constraints': [models.UniqueConstraint(condition=models.Q(('lifted_at__isnull', True)), fields=('organization',), name='suspension_one_at_a_time')],
            },
        ),
        EnableRLS("Suspension", app="SELECT", operator="SELECT, INSERT, UPDATE"),
        RunStatements(NOTES, UNDO, what="Tell gateways of suspended owners, and log suspensions"),
    ]
