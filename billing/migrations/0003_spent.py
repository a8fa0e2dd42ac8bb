"""What a key, a project or an organization has spent: gateways seed their counters with it."""

from django.db import migrations

from controlplane.tenants.rls import RunStatements

# Gateways have the app role and no tenant when they ask, hence SECURITY DEFINER. One branch per scope, so that
# each is planned with its own index. The indexes hold the amount: the sum reads no row.
SPENT = """
CREATE INDEX usageevent_spent_org ON billing_usageevent (organization_id) INCLUDE (cost_nano);
CREATE INDEX usageevent_spent_prj ON billing_usageevent (project_id) INCLUDE (cost_nano);
CREATE INDEX usageevent_spent_key ON billing_usageevent (api_key_id) INCLUDE (cost_nano);

CREATE FUNCTION corral_spent(scope text, id uuid) RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    total numeric;
BEGIN
    CASE scope
        WHEN 'org' THEN
            SELECT sum(cost_nano) INTO total FROM billing_usageevent WHERE organization_id = corral_spent.id;
        WHEN 'prj' THEN
            SELECT sum(cost_nano) INTO total FROM billing_usageevent WHERE project_id = corral_spent.id;
        WHEN 'key' THEN
            SELECT sum(cost_nano) INTO total FROM billing_usageevent WHERE api_key_id = corral_spent.id;
        ELSE
            RAISE EXCEPTION 'scope=%: must be key, prj or org', scope;
    END CASE;
    RETURN coalesce(total, 0)::bigint;
END
$$;
REVOKE ALL ON FUNCTION corral_spent(text, uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_spent(text, uuid) TO corral_app, corral_operator;
"""

UNDO_SPENT = """
DROP FUNCTION corral_spent(text, uuid);
DROP INDEX usageevent_spent_org, usageevent_spent_prj, usageevent_spent_key;
"""


class Migration(migrations.Migration):
    dependencies = [("billing", "0002_isolation")]

    operations = [RunStatements(SPENT, UNDO_SPENT, what="Sum what a scope has spent")]
