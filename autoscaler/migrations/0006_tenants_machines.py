"""What a tenant may know of machines: those its own replicas live on, and what one of the pool costs."""

from django.db import migrations

from controlplane.tenants.rls import TENANT, RunStatements

# Machines are the house's and hidden from the app role, hence SECURITY DEFINER. Nothing of other tenants is told: only
# machines with a live replica of the tenant of the transaction, and only its own replicas are counted.
FUNCTIONS = f"""
CREATE FUNCTION corral_my_machines() RETURNS TABLE (
    id uuid, provider text, cell text, state text, offering text, n_cpus int, memory_bytes bigint, n_gpus int,
    created_at timestamptz, ready_at timestamptz, ends_at timestamptz, n_replicas int
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT m.id, m.provider, m.cell, m.state, m.offering,
        CASE WHEN jsonb_typeof(m.capabilities -> 'n_cpus') = 'number'
            THEN least((m.capabilities ->> 'n_cpus')::numeric, 100000)::int END,
        CASE WHEN jsonb_typeof(m.capabilities -> 'memory_bytes') = 'number'
            THEN least((m.capabilities ->> 'memory_bytes')::numeric, 1e15)::bigint END,
        CASE WHEN jsonb_typeof(m.capabilities -> 'gpus') = 'array'
            THEN jsonb_array_length(m.capabilities -> 'gpus') ELSE 0 END,
        m.created_at, m.ready_at, m.ends_at, mine.n::int
    FROM autoscaler_machine m
    JOIN (
        SELECT r.machine_id, count(*) AS n FROM autoscaler_replica r
        WHERE r.organization_id = {TENANT} AND r.phase NOT IN ('stopped', 'failed')
        GROUP BY r.machine_id
    ) AS mine ON mine.machine_id = m.id
    WHERE m.state <> 'gone'
$$;
CREATE FUNCTION corral_machine_is_mine_alone(machine uuid) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT coalesce(bool_and(r.organization_id = {TENANT}), false) FROM autoscaler_replica r
    WHERE r.machine_id = machine AND r.phase NOT IN ('stopped', 'failed')
$$;
CREATE FUNCTION corral_machine_price(of_cell text, of_provider text, since timestamptz) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.price_nano_per_h FROM autoscaler_offer o
    WHERE o.cell = of_cell AND o.provider = of_provider AND o.priced_at > since
    ORDER BY o.is_spot, o.price_nano_per_h LIMIT 1
$$;
REVOKE ALL ON FUNCTION corral_my_machines() FROM PUBLIC;
REVOKE ALL ON FUNCTION corral_machine_is_mine_alone(uuid) FROM PUBLIC;
REVOKE ALL ON FUNCTION corral_machine_price(text, text, timestamptz) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_my_machines() TO corral_app, corral_operator;
GRANT EXECUTE ON FUNCTION corral_machine_is_mine_alone(uuid) TO corral_app, corral_operator;
GRANT EXECUTE ON FUNCTION corral_machine_price(text, text, timestamptz) TO corral_app, corral_operator;
"""
UNDO = """
DROP FUNCTION corral_my_machines();
DROP FUNCTION corral_machine_is_mine_alone(uuid);
DROP FUNCTION corral_machine_price(text, text, timestamptz);
"""


class Migration(migrations.Migration):
    dependencies = [("autoscaler", "0005_market")]

    operations = [RunStatements(FUNCTIONS, UNDO, what="Tell a tenant of the machines its replicas live on")]
