"""What the kinds of machine that are sold cost, as anybody may ask: a plan's price reckons by what each holds."""

from django.db import migrations

from controlplane.tenants.rls import RunStatements

# corral_machine_price() stays beside it for the version before.
FUNCTIONS = """
CREATE FUNCTION corral_machine_kinds(of_cell text, of_provider text, since timestamptz)
RETURNS TABLE (is_spot boolean, gpu varchar, n_gpus integer, price_nano_per_h bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.is_spot, o.gpu, o.n_gpus, min(o.price_nano_per_h) FROM autoscaler_offer o
    WHERE o.cell = of_cell AND o.provider = of_provider AND o.priced_at > since
    GROUP BY o.is_spot, o.gpu, o.n_gpus
$$;
REVOKE ALL ON FUNCTION corral_machine_kinds(text, text, timestamptz) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_machine_kinds(text, text, timestamptz) TO corral_app, corral_operator;
"""
UNDO = "DROP FUNCTION corral_machine_kinds(text, text, timestamptz);"


class Migration(migrations.Migration):
    dependencies = [("autoscaler", "0015_by_hand")]

    operations = [
        RunStatements(FUNCTIONS, UNDO, what="Tell a tenant what kinds of machine cost and hold")
    ]
