"""A key is asked for with its digest: a wrong secret gets the answer that an unknown lookup part gets, by the same
steps. And the one write that a gateway may make: an imported key's digest becomes an ordinary one."""

from django.db import migrations

from controlplane.tenants.rls import RunStatements

KNOWN = """
CREATE FUNCTION corral_key_known(p_lookup text, p_digests text[]) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM tenants_apikey WHERE lookup = p_lookup AND encode(digest, 'hex') = ANY (p_digests)
    )
$$;
REVOKE ALL ON FUNCTION corral_key_known(text, text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_known(text, text[]) TO corral_app, corral_operator;

CREATE FUNCTION corral_key_rehash(p_lookup text, p_old text, p_new text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    WITH changed AS (
        UPDATE tenants_apikey SET digest = decode(p_new, 'hex')
        WHERE lookup = p_lookup AND origin <> '' AND digest = decode(p_old, 'hex') AND length(p_new) = 64
        RETURNING 1
    )
    SELECT EXISTS (SELECT FROM changed)
$$;
CREATE FUNCTION corral_management_token_known(p_lookup text, p_digests text[])
RETURNS TABLE (
    organization_id uuid, token_id uuid, service_account_id uuid, role text, scopes jsonb, suspended_at timestamptz
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.id, t.id, a.id, a.role::text, t.scopes, o.suspended_at
    FROM tenants_managementtoken t
    JOIN tenants_serviceaccount a ON a.id = t.service_account_id
    JOIN tenants_organization o ON o.id = t.organization_id
    WHERE t.lookup = p_lookup AND encode(t.digest, 'hex') = ANY (p_digests)
        AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now()) AND a.deleted_at IS NULL
$$;
REVOKE ALL ON FUNCTION corral_management_token_known(text, text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_management_token_known(text, text[]) TO corral_app, corral_operator;
REVOKE ALL ON FUNCTION corral_key_rehash(text, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_rehash(text, text, text) TO corral_app, corral_operator;
"""
UNDO = """
DROP FUNCTION corral_key_known(text, text[]);
DROP FUNCTION corral_key_rehash(text, text, text);
DROP FUNCTION corral_management_token_known(text, text[]);
"""


class Migration(migrations.Migration):

    dependencies = [
        ('tenants', '0006_key_scopes'),
    ]

    operations = [
        RunStatements(KNOWN, UNDO, what="Check a key in one question; re-hash imported ones"),
    ]
