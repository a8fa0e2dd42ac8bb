"""Row-level security, grants, and the change notes that gateways poll."""

from django.db import migrations

from controlplane.tenants.rls import ALL, EnableRLS, Grant, RunStatements, SameTenant

# Which of a user's organizations may be entered is asked before a tenant is known, hence SECURITY DEFINER.
MEMBERSHIPS = """
CREATE FUNCTION corral_user_memberships(p_user_id uuid)
RETURNS TABLE (
    organization_id uuid, member_id uuid, role text, name text, slug text, timezone text, suspended_at timestamptz
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT o.id, m.id, m.role::text, o.name::text, o.slug::text, o.timezone::text, o.suspended_at
    FROM tenants_member m
    JOIN tenants_organization o ON o.id = m.organization_id
    WHERE m.user_id = p_user_id
    ORDER BY o.name, o.id
$$;
REVOKE ALL ON FUNCTION corral_user_memberships(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_user_memberships(uuid) TO corral_app, corral_operator;
"""

# Gateways cache keys and deployments; each change of what they cache leaves a note here in the same transaction,
# whoever made it and however. Notes carry the transaction id, not a time: a reader that remembers the oldest
# transaction still running at its last look (the watermark) can never miss one that commits late.
CHANGES = """
CREATE TABLE corral_change (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    ref text NOT NULL,  -- key:<lookup>, prj:<hex>, org:<hex>, dep:<hex>, all
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX corral_change_xid ON corral_change (xid);

-- Notes up to this transaction were pruned; a reader that far behind must drop everything it cached.
CREATE TABLE corral_change_horizon (only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), xid xid8 NOT NULL);
INSERT INTO corral_change_horizon (xid) VALUES ('0');

-- Arguments: columns whose change nobody caches.
CREATE FUNCTION corral_note_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    was jsonb := CASE WHEN TG_OP = 'INSERT' THEN NULL ELSE to_jsonb(OLD) END;
    becomes jsonb := CASE WHEN TG_OP = 'DELETE' THEN NULL ELSE to_jsonb(NEW) END;
    it jsonb := coalesce(becomes, was);
BEGIN
    IF TG_OP = 'UPDATE' AND (was - TG_ARGV) = (becomes - TG_ARGV) THEN
        RETURN NULL;
    END IF;
    IF TG_TABLE_NAME = 'tenants_apikey' THEN
        INSERT INTO corral_change (ref) VALUES ('key:' || (it ->> 'lookup'));
    ELSIF TG_TABLE_NAME = 'tenants_project' THEN
        INSERT INTO corral_change (ref) VALUES ('prj:' || replace(it ->> 'id', '-', ''));
    ELSIF TG_TABLE_NAME = 'tenants_organization' THEN
        INSERT INTO corral_change (ref) VALUES ('org:' || replace(it ->> 'id', '-', ''));
    ELSIF TG_TABLE_NAME = 'deployments_deployment' THEN
        -- prj: as well, for the keys that have cached the project's list without it.
        INSERT INTO corral_change (ref) VALUES
            ('dep:' || replace(it ->> 'id', '-', '')), ('prj:' || replace(it ->> 'project_id', '-', ''));
    ELSE
        INSERT INTO corral_change (ref) VALUES ('all');
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_change() FROM PUBLIC;

CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON tenants_apikey
    FOR EACH ROW EXECUTE FUNCTION corral_note_change('last_used_at', 'name');
CREATE TRIGGER note_change AFTER UPDATE OR DELETE ON tenants_project
    FOR EACH ROW EXECUTE FUNCTION corral_note_change('updated_at', 'name');
CREATE TRIGGER note_change AFTER UPDATE OR DELETE ON tenants_organization
    FOR EACH ROW EXECUTE FUNCTION corral_note_change('updated_at', 'name');

CREATE FUNCTION corral_changes_since(p_watermark text) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    next_xid xid8 := pg_snapshot_xmin(pg_current_snapshot());
    since xid8 := p_watermark::xid8;
    refs text[];
BEGIN
    -- No watermark, one from another server's history, or one older than what is kept: start afresh.
    IF since IS NULL OR since > next_xid OR since <= (SELECT xid FROM corral_change_horizon) THEN
        RETURN jsonb_build_object('watermark', next_xid::text, 'reset', since IS NOT NULL, 'changes', '[]'::jsonb);
    END IF;
    SELECT array_agg(ref) INTO refs
    FROM (SELECT DISTINCT ref FROM corral_change WHERE xid >= since LIMIT 2001) AS noted;
    IF cardinality(refs) > 2000 THEN
        RETURN jsonb_build_object('watermark', next_xid::text, 'reset', true, 'changes', '[]'::jsonb);
    END IF;
    RETURN jsonb_build_object(
        'watermark', next_xid::text, 'reset', false, 'changes', to_jsonb(coalesce(refs, ARRAY[]::text[]))
    );
END
$$;
REVOKE ALL ON FUNCTION corral_changes_since(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_changes_since(text) TO corral_app, corral_operator;

CREATE FUNCTION corral_prune_changes(p_keep interval) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    WITH pruned AS (
        DELETE FROM corral_change
        WHERE at < now() - p_keep AND xid < pg_snapshot_xmin(pg_current_snapshot())
        RETURNING xid
    ), moved AS (
        UPDATE corral_change_horizon SET xid = greatest(xid, (SELECT max(xid) FROM pruned))
        WHERE EXISTS (SELECT 1 FROM pruned)
    )
    SELECT count(*) FROM pruned
$$;
REVOKE ALL ON FUNCTION corral_prune_changes(interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_prune_changes(interval) TO corral_operator;
"""

UNDO_CHANGES = """
DROP TRIGGER note_change ON tenants_apikey;
DROP TRIGGER note_change ON tenants_project;
DROP TRIGGER note_change ON tenants_organization;
DROP FUNCTION corral_changes_since(text);
DROP FUNCTION corral_prune_changes(interval);
DROP FUNCTION corral_note_change();
DROP TABLE corral_change, corral_change_horizon;
"""


class Migration(migrations.Migration):
    dependencies = [
        ("tenants", "0001_initial"),
        ("sessions", "0001_initial"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        # Signing in happens before a tenant is known; a user may belong to several.
        Grant("User", app="SELECT, INSERT, UPDATE", operator=ALL),
        Grant("Session", app_label="sessions", app=ALL, operator=ALL),
        EnableRLS("Organization", column="id", app="SELECT, INSERT, UPDATE"),
        EnableRLS("Project", app="SELECT, INSERT, UPDATE"),
        EnableRLS("Member"),
        EnableRLS("ApiKey", app="SELECT, INSERT, UPDATE"),
        SameTenant("ApiKey", "project"),
        RunStatements(MEMBERSHIPS, "DROP FUNCTION corral_user_memberships(uuid)", what="Look up a user's organizations"),
        RunStatements(CHANGES, UNDO_CHANGES, what="Note the changes that gateways must hear of"),
    ]
