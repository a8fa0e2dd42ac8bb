"""How a deployment refuses, and how many requests of a class must meet its targets."""

from django.db import migrations, models

from controlplane.tenants.rls import RunStatements

OBJECTIVES = """
UPDATE deployments_sloclass SET objective_ppm = 950000 WHERE name = 'batch';
UPDATE deployments_sloclass SET objective_ppm = 900000 WHERE name = 'flex';
SET CONSTRAINTS ALL IMMEDIATE;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0004_spent_in_cell'),
        ('deployments', '0005_cell'),
        ('tenants', '0005_management'),
    ]

    operations = [
        migrations.AddField(
            model_name='deployment',
            name='admission',
            field=models.CharField(choices=[('auto', 'Auto'), ('predicted', 'Predicted'), ('bounded', 'Bounded')], db_default='auto', default='auto', help_text='when a request is refused although its limits allow it', max_length=10),
        ),
        migrations.AddField(
            model_name='sloclass',
            name='objective_ppm',
            field=models.PositiveIntegerField(db_default=990000, default=990000, help_text='millionths of the requests that must meet all targets'),
        ),
        migrations.AlterField(
            model_name='sloclass',
            name='deadline_s',
            field=models.PositiveIntegerField(help_text='target time to the last token'),
        ),
        migrations.AddConstraint(
            model_name='deployment',
            constraint=models.CheckConstraint(condition=models.Q(('admission__in', ['auto', 'predicted', 'bounded'])), name='deployment_admission_known'),
        ),
        RunStatements(OBJECTIVES, "SELECT 1", what="Those who can wait are promised less"),
    ]
