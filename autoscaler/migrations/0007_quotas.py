"""For whom a machine was bought, and its GPUs: what quotas count."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('autoscaler', '0006_tenants_machines'),
    ]

    operations = [
        migrations.AddField(
            model_name='machine',
            name='launched_for',
            field=models.UUIDField(blank=True, help_text='the organization whose deployment it was bought for', null=True),
        ),
        migrations.AddField(
            model_name='machine',
            name='n_gpus',
            field=models.PositiveIntegerField(default=0, help_text='of what was bought, or may be'),
        ),
    ]
