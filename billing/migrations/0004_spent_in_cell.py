"""What a scope has spent in one cell: the cells' parts of a budget are counted apart."""

from django.db import migrations

from controlplane.tenants.rls import RunStatements

# The machine that served a request names the cell. Read when a cell's counters are seeded and when budgets are divided.
SPENT_IN = """
CREATE FUNCTION corral_spent_in(scope text, id uuid, p_cell text) RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    total numeric;
BEGIN
    CASE scope
        WHEN 'org' THEN
            SELECT sum(u.cost_nano) INTO total FROM billing_usageevent u JOIN autoscaler_machine m ON m.id = u.machine_id
            WHERE u.organization_id = corral_spent_in.id AND m.cell = p_cell;
        WHEN 'prj' THEN
            SELECT sum(u.cost_nano) INTO total FROM billing_usageevent u JOIN autoscaler_machine m ON m.id = u.machine_id
            WHERE u.project_id = corral_spent_in.id AND m.cell = p_cell;
        WHEN 'key' THEN
            SELECT sum(u.cost_nano) INTO total FROM billing_usageevent u JOIN autoscaler_machine m ON m.id = u.machine_id
            WHERE u.api_key_id = corral_spent_in.id AND m.cell = p_cell;
        ELSE
            RAISE EXCEPTION 'scope=%: must be key, prj or org', scope;
    END CASE;
    RETURN coalesce(total, 0)::bigint;
END
$$;
REVOKE ALL ON FUNCTION corral_spent_in(text, uuid, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_spent_in(text, uuid, text) TO corral_app, corral_operator;
"""


class Migration(migrations.Migration):
    dependencies = [("billing", "0003_spent")]

    operations = [
        RunStatements(
            SPENT_IN,
            "DROP FUNCTION corral_spent_in(text, uuid, text)",
            what="Sum what a scope has spent in one cell",
        )
    ]
