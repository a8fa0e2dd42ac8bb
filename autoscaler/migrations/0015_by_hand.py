"""Decisions of an operator's own about machines."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('autoscaler', '0014_gpu_health'),
    ]

    operations = [
        migrations.RemoveConstraint(
            model_name='pooldecision',
            name='pooldecision_kind_known',
        ),
        migrations.AlterField(
            model_name='pooldecision',
            name='kind',
            field=models.CharField(choices=[('purchase', 'Purchase'), ('health', 'Health'), ('operator', 'Operator'), ('pool', 'Pool')], max_length=16),
        ),
        migrations.AddConstraint(
            model_name='pooldecision',
            constraint=models.CheckConstraint(condition=models.Q(('kind__in', ['purchase', 'health', 'operator', 'pool'])), name='pooldecision_kind_known'),
        ),
    ]
