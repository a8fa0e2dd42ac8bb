"""What an adapter uses counts under a budget of its deployment's name, as gateways count it."""

from django.db import migrations

from controlplane.tenants.rls import EditFunction

SPENT = "corral_budget_spent(uuid, bigint, bigint, bigint, text)"
SUBJECTS = ("s.api_key_id = b.api_key_id", "s.project_id = b.project_id", "WHERE s.organization_id = b.organization_id")
WINDOW = " AND s.quarter >= since AND s.quarter < until\n                AND (b.model = '' OR s.model = b.model"
ADAPTERS = " OR split_part(s.model, ':', 1) = b.model"


class Migration(migrations.Migration):

    dependencies = [
        ('adapters', '0001_initial'),
        ('budgets', '0001_initial'),
    ]

    operations = [
        EditFunction(
            SPENT, f"{subject}{WINDOW})", f"{subject}{WINDOW}{ADAPTERS})", what="Count what adapters use under a budget"
        )
        for subject in SUBJECTS
    ]
