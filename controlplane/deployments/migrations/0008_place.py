from django.db import migrations

from controlplane.tenants.rls import RunStatements


class Migration(migrations.Migration):

    dependencies = [
        ('deployments', '0007_retired'),
    ]

    operations = [
        RunStatements(
            "GRANT UPDATE (source_kind, source_uri) ON deployments_modelversion TO corral_operator;",
            "REVOKE UPDATE (source_kind, source_uri) ON deployments_modelversion FROM corral_operator;",
            what="Let the house say where machines fetch a model version from; tenants may not",
        ),
    ]
