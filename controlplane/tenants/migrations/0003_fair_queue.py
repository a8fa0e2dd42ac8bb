"""Organizations and keys have a weight in the fair queue, as projects do."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('tenants', '0002_isolation'),
    ]

    operations = [
        migrations.AddField(
            model_name='apikey',
            name='weight',
            field=models.PositiveSmallIntegerField(db_default=100, default=100, help_text='share of the fair queue, 1-10000'),
        ),
        migrations.AddField(
            model_name='organization',
            name='weight',
            field=models.PositiveSmallIntegerField(db_default=100, default=100, help_text='share of the fair queue, 1-10000'),
        ),
        migrations.AlterField(
            model_name="project",
            name="weight",
            field=models.PositiveSmallIntegerField(
                db_default=100, default=100, help_text="share of the fair queue, 1-10000"
            ),
        ),
        migrations.AddConstraint(
            model_name='apikey',
            constraint=models.CheckConstraint(condition=models.Q(('weight__gte', 1), ('weight__lte', 10000)), name='apikey_weight_in_range'),
        ),
        migrations.AddConstraint(
            model_name='organization',
            constraint=models.CheckConstraint(condition=models.Q(('weight__gte', 1), ('weight__lte', 10000)), name='organization_weight_in_range'),
        ),
    ]
