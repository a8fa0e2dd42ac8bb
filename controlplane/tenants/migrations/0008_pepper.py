"""Under which pepper a secret is hashed, and how a process that has just seen it keeps it under another."""

from django.db import migrations, models

from controlplane.tenants.rls import RunStatements

# Whose a key is nobody knows at that moment, hence SECURITY DEFINER. Compare-and-set: who knows the stored digest has
# just verified it, and a key that was changed meanwhile stays as it is. An imported key's lookup part moves, too; whoever
# cached it under the former one must hear of that, or would not hear of its end.
MOVE = """
DROP FUNCTION corral_key_rehash(text, text, text);
CREATE FUNCTION corral_key_move(p_lookup text, p_old text, p_new_lookup text, p_new text, p_pepper text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    UPDATE tenants_apikey SET lookup = p_new_lookup, digest = decode(p_new, 'hex'), pepper = p_pepper
    WHERE lookup = p_lookup AND digest = decode(p_old, 'hex') AND length(p_new) = 64
        AND (lookup = p_new_lookup OR origin <> '');
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_new_lookup <> p_lookup THEN
        INSERT INTO corral_change (ref) VALUES ('key:' || p_lookup);
    END IF;
    RETURN true;
END
$$;
REVOKE ALL ON FUNCTION corral_key_move(text, text, text, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_move(text, text, text, text, text) TO corral_app, corral_operator;

CREATE FUNCTION corral_token_move(p_lookup text, p_old text, p_new text, p_pepper text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    WITH changed AS (
        UPDATE tenants_managementtoken SET digest = decode(p_new, 'hex'), pepper = p_pepper
        WHERE lookup = p_lookup AND digest = decode(p_old, 'hex') AND length(p_new) = 64
        RETURNING 1
    )
    SELECT EXISTS (SELECT FROM changed)
$$;
REVOKE ALL ON FUNCTION corral_token_move(text, text, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_token_move(text, text, text, text) TO corral_app, corral_operator;
"""
UNDO = """
DROP FUNCTION corral_token_move(text, text, text, text);
DROP FUNCTION corral_key_move(text, text, text, text, text);
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
REVOKE ALL ON FUNCTION corral_key_rehash(text, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_key_rehash(text, text, text) TO corral_app, corral_operator;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('tenants', '0007_presented_keys'),
    ]

    operations = [
        migrations.AddField(
            model_name='apikey',
            name='pepper',
            field=models.CharField(db_default='', default='', editable=False, help_text='id of the one it is hashed under', max_length=8),
        ),
        migrations.AddField(
            model_name='managementtoken',
            name='pepper',
            field=models.CharField(db_default='', default='', editable=False, help_text='id of the one it is hashed under', max_length=8),
        ),
        RunStatements(MOVE, UNDO, what="Keep a key under another pepper"),
    ]
