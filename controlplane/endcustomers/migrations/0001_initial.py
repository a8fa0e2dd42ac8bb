"""Limits on end customers, how gateways read them with a key, and what a customer has spent."""

import controlplane.ids
import django.db.models.deletion
from django.db import migrations, models

from controlplane.tenants.rls import EnableRLS, RunStatements, SameTenant

# Asked before a tenant is known, hence SECURITY DEFINER; whoever asks must know a key.
LOOKUP = """
CREATE FUNCTION corral_with_end_customers(p_found jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    limited jsonb;
BEGIN
    IF p_found IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT jsonb_agg(jsonb_build_object(
        'customer', l.customer,
        'limits', jsonb_build_object(
            'rpm', l.rpm, 'input_tpm', l.input_tpm, 'output_tpm', l.output_tpm,
            'max_concurrency', l.max_concurrency, 'budget_nano', l.budget_nano)) ORDER BY l.id) INTO limited
    FROM endcustomers_endcustomerlimits l
    WHERE l.project_id = (p_found -> 'project' ->> 'id')::uuid;
    IF limited IS NULL THEN
        RETURN p_found;
    END IF;
    RETURN p_found || jsonb_build_object('end_customers', limited);
END
$$;
REVOKE ALL ON FUNCTION corral_with_end_customers(jsonb) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_with_end_customers(jsonb) TO corral_app, corral_operator;

-- Booked for a customer of a project, in one cell or (NULL) in all. A gateway asks it where its Redis does not know.
CREATE INDEX usageevent_spent_end ON billing_usageevent (project_id, end_customer) INCLUDE (cost_nano)
    WHERE end_customer <> '';
CREATE FUNCTION corral_spent_for(p_project uuid, p_customer text, p_cell text) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    SELECT coalesce(sum(u.cost_nano), 0)::bigint FROM billing_usageevent u
    WHERE u.project_id = p_project AND u.end_customer = p_customer AND u.end_customer <> ''
        AND (p_cell IS NULL OR EXISTS (
            SELECT FROM autoscaler_machine m WHERE m.id = u.machine_id AND m.cell = p_cell))
$$;
REVOKE ALL ON FUNCTION corral_spent_for(uuid, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION corral_spent_for(uuid, text, text) TO corral_app, corral_operator;

CREATE FUNCTION corral_note_end_customer_limits() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    INSERT INTO corral_change (ref) VALUES ('prj:' || corral_hex(coalesce(NEW.project_id, OLD.project_id)));
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION corral_note_end_customer_limits() FROM PUBLIC;
CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON endcustomers_endcustomerlimits
    FOR EACH ROW EXECUTE FUNCTION corral_note_end_customer_limits();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON endcustomers_endcustomerlimits
    FOR EACH ROW EXECUTE FUNCTION corral_audit('end_customer_limits', 'organization_id');
"""
UNDO_LOOKUP = """
DROP TRIGGER audit ON endcustomers_endcustomerlimits;
DROP TRIGGER note_change ON endcustomers_endcustomerlimits;
DROP FUNCTION corral_note_end_customer_limits();
DROP FUNCTION corral_spent_for(uuid, text, text);
DROP INDEX usageevent_spent_end;
DROP FUNCTION corral_with_end_customers(jsonb);
"""


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('tenants', '0009_found_by_digest'),
        ('audit', '0001_initial'),
        ('autoscaler', '0001_initial'),
        ('billing', '0006_end_customer'),
    ]

    operations = [
        migrations.CreateModel(
            name='EndCustomerLimits',
            fields=[
                ('id', models.UUIDField(default=controlplane.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('customer', models.CharField(blank=True, help_text='pseudonym; empty = every customer', max_length=24)),
                ('rpm', models.PositiveIntegerField(blank=True, help_text='requests per minute', null=True)),
                ('input_tpm', models.PositiveIntegerField(blank=True, help_text='prompt tokens per minute', null=True)),
                ('output_tpm', models.PositiveIntegerField(blank=True, help_text='completion tokens per minute', null=True)),
                ('max_concurrency', models.PositiveIntegerField(blank=True, help_text='requests in flight', null=True)),
                ('budget_nano', models.BigIntegerField(blank=True, help_text='money to spend, nano-dollars', null=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.organization')),
                ('project', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.PROTECT, related_name='+', to='tenants.project')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('project', 'customer'), name='endcustomerlimits_unique'), models.CheckConstraint(condition=models.Q(('budget_nano__isnull', True), ('budget_nano__gte', 0), _connector='OR'), name='endcustomerlimits_budget_not_negative'), models.CheckConstraint(condition=models.Q(('customer__regex', '^([0-9a-f]{24})?$')), name='endcustomerlimits_pseudonym')],
            },
        ),
        EnableRLS("EndCustomerLimits"),
        SameTenant("EndCustomerLimits", "project"),
        RunStatements(LOOKUP, UNDO_LOOKUP, what="Gateways and the audit log hear of limits on end customers"),
    ]
