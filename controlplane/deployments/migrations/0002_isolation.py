"""Row-level security, grants, the service classes, and the one lookup a gateway makes for an API key."""

from django.db import migrations

from controlplane.tenants.rls import EnableRLS, Grant, RunStatements, SameTenant

SLO_CLASSES = """
INSERT INTO deployments_sloclass (name, band, ttft_ms, itl_ms, deadline_s) VALUES
    ('interactive', 0, 1000, 100, 300),
    ('standard', 1, 5000, 250, 900),
    ('batch', 2, 600000, 2000, 86400),
    ('flex', 3, 3600000, 5000, 86400);
"""

NOTE_CHANGES = """
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON deployments_deployment
    FOR EACH ROW EXECUTE FUNCTION corral_note_change('updated_at', 'phase', 'last_error');
CREATE TRIGGER note_change AFTER UPDATE OR DELETE ON deployments_sloclass
    FOR EACH ROW EXECUTE FUNCTION corral_note_change();
"""
UNDO_NOTE_CHANGES = """
DROP TRIGGER note_change ON deployments_deployment;
DROP TRIGGER note_change ON deployments_sloclass;
"""

# Asked before a tenant is known, hence SECURITY DEFINER. NULL = no such key. Instants are milliseconds since the
# epoch, ids bare hex. The caller compares the digest; the answer itself decides nothing.
KEY_LOOKUP = """
CREATE FUNCTION corral_hex(p_id uuid) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT replace(p_id::text, '-', '') $$;

CREATE FUNCTION corral_ms(p_at timestamptz) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT floor(extract(epoch FROM p_at) * 1000)::bigint $$;

CREATE FUNCTION corral_key_lookup(p_lookup text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    k tenants_apikey;
    p tenants_project;
    o tenants_organization;
    served jsonb;
BEGIN
    SELECT * INTO k FROM tenants_apikey WHERE lookup = p_lookup;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT * INTO p FROM tenants_project WHERE id = k.project_id;
    SELECT * INTO o FROM tenants_organization WHERE id = k.organization_id;
    SELECT jsonb_agg(jsonb_build_object(
        'id', corral_hex(d.id),
        'name', d.name,
        'model_version', corral_hex(m.id),
        'engine', d.engine_profile ->> 'engine',
        'max_model_len', least(m.max_model_len, (d.engine_profile ->> 'max_model_len')::integer),
        'min_replicas', d.min_replicas,
        'max_replicas', d.max_replicas,
        'generation', d.generation,
        'created_at_ms', corral_ms(d.created_at),
        'slo', jsonb_build_object(
            'name', s.name, 'band', s.band, 'ttft_ms', s.ttft_ms, 'itl_ms', s.itl_ms, 'deadline_s', s.deadline_s),
        'price', jsonb_build_object(
            'version', corral_hex(v.id),
            'input_nano_per_million', v.input_nano_per_million,
            'cached_nano_per_million', v.cached_nano_per_million,
            'output_nano_per_million', v.output_nano_per_million)
    ) ORDER BY d.name) INTO served
    FROM deployments_deployment d
    JOIN deployments_modelversion m ON m.id = d.model_version_id
    JOIN deployments_sloclass s ON s.name = d.slo_class_id
    JOIN billing_priceversion v ON v.id = d.price_version_id
    WHERE d.project_id = p.id AND d.deleted_at IS NULL;
    RETURN jsonb_build_object(
        'key', jsonb_build_object(
            'id', corral_hex(k.id),
            'lookup', k.lookup,
            'name', k.name,
            'digest', encode(k.digest, 'hex'),
            'expires_at_ms', corral_ms(k.expires_at),
            'revoked_at_ms', corral_ms(k.revoked_at),
            'limits', jsonb_build_object('rpm', k.rpm, 'input_tpm', k.input_tpm, 'output_tpm', k.output_tpm,
                'max_concurrency', k.max_concurrency, 'budget_nano', k.budget_nano)),
        'project', jsonb_build_object(
            'id', corral_hex(p.id),
            'slug', p.slug,
            'weight', p.weight,
            'zero_retention', p.zero_retention,
            'limits', jsonb_build_object('rpm', p.rpm, 'input_tpm', p.input_tpm, 'output_tpm', p.output_tpm,
                'max_concurrency', p.max_concurrency, 'budget_nano', p.budget_nano)),
        'organization', jsonb_build_object(
            'id', corral_hex(o.id),
            'slug', o.slug,
            'timezone', o.timezone,
            'suspended_at_ms', corral_ms(o.suspended_at),
            'limits', jsonb_build_object('rpm', o.rpm, 'input_tpm', o.input_tpm, 'output_tpm', o.output_tpm,
                'max_concurrency', o.max_concurrency, 'budget_nano', o.budget_nano)),
        'deployments', coalesce(served, '[]'::jsonb)
    );
END
$$;
REVOKE ALL ON FUNCTION corral_key_lookup(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_lookup(text) TO corral_app, corral_operator;
"""
UNDO_KEY_LOOKUP = """
DROP FUNCTION corral_key_lookup(text);
DROP FUNCTION corral_hex(uuid);
DROP FUNCTION corral_ms(timestamptz);
"""


class Migration(migrations.Migration):
    dependencies = [
        ("deployments", "0001_initial"),
        ("tenants", "0002_isolation"),
        ("billing", "0002_isolation"),
    ]

    operations = [
        Grant("SloClass", app="SELECT", operator="SELECT"),
        RunStatements(SLO_CLASSES, "DELETE FROM deployments_sloclass", what="The service classes"),
        EnableRLS("ModelVersion", app="SELECT, INSERT", operator="SELECT, INSERT"),
        EnableRLS("Deployment", app="SELECT, INSERT, UPDATE"),
        SameTenant("Deployment", "project"),
        SameTenant("Deployment", "model_version"),
        RunStatements(NOTE_CHANGES, UNDO_NOTE_CHANGES, what="Note the changes that gateways must hear of"),
        RunStatements(KEY_LOOKUP, UNDO_KEY_LOOKUP, what="Look up an API key with all a gateway needs"),
    ]
