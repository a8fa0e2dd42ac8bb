"""Row-level security and grants, the default price, and the function that keeps partitions ahead of time."""

from django.db import migrations

from controlplane.tenants.rls import EnableRLS, RunStatements

# $0.10, $0.025 and $0.40 per million tokens.
DEFAULT_PRICE = """
INSERT INTO billing_priceversion
    (id, name, input_nano_per_million, cached_nano_per_million, output_nano_per_million, valid_from)
VALUES
    ('019b76da-a800-7000-8000-000000000001', 'standard', 100000000, 25000000, 400000000, '2026-01-01T00:00:00Z');
"""

UNDO_DEFAULT_PRICE = "DELETE FROM billing_priceversion WHERE name = 'standard'; SET CONSTRAINTS ALL IMMEDIATE"

# Owned by corral_owner, so that the operator role can have partitions made without being allowed any DDL.
PARTITIONS = """
CREATE FUNCTION corral_ensure_usage_partitions(p_days_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '2s'
AS $$
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
    first_day date := today - 1;  -- witnesses of yesterday's requests still arrive
    d date;
    partition text;
    made integer := 0;
BEGIN
    IF p_days_ahead NOT BETWEEN 0 AND 60 THEN
        RAISE EXCEPTION 'p_days_ahead=%: must be from 0 to 60', p_days_ahead;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('corral_ensure_usage_partitions'));
    FOR d IN SELECT generate_series(first_day, today + p_days_ahead, interval '1 day')::date LOOP
        partition := 'billing_usageevent_p' || to_char(d, 'YYYYMMDD');
        CONTINUE WHEN to_regclass(partition) IS NOT NULL;
        EXECUTE format('CREATE TABLE %I (LIKE billing_usageevent INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
        -- Rows that reached the default partition first move over; nobody may add one in between.
        LOCK TABLE billing_usageevent_default IN ACCESS EXCLUSIVE MODE;
        EXECUTE format(
            'WITH moved AS (DELETE FROM billing_usageevent_default WHERE day = %L RETURNING *) '
            'INSERT INTO %I SELECT * FROM moved', d, partition);
        EXECUTE format(
            'ALTER TABLE billing_usageevent ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition, d, d + 1);
        made := made + 1;
    END LOOP;
    RETURN made;
END
$$;
REVOKE ALL ON FUNCTION corral_ensure_usage_partitions(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_ensure_usage_partitions(integer) TO corral_operator;
SELECT corral_ensure_usage_partitions(7);
"""


class Migration(migrations.Migration):
    dependencies = [("billing", "0001_initial"), ("tenants", "0002_isolation")]

    operations = [
        # Append-only for everybody: a price or an event is never changed, only followed by another.
        EnableRLS("PriceVersion", app="SELECT", operator="SELECT, INSERT", shared_rows=True),
        EnableRLS("UsageEvent", app="SELECT", operator="SELECT, INSERT"),
        RunStatements(DEFAULT_PRICE, UNDO_DEFAULT_PRICE, what="Default price"),
        RunStatements(
            PARTITIONS, "DROP FUNCTION corral_ensure_usage_partitions(integer)", what="Make usage partitions ahead of time"
        ),
    ]
