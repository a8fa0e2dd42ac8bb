"""What the pool gives up and buys of its own accord."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('autoscaler', '0008_decisions'),
    ]

    operations = [
        migrations.AddField(
            model_name='machine',
            name='given_up_at',
            field=models.DateTimeField(blank=True, help_text='we move everything off it, of our own accord, to save money', null=True),
        ),
        migrations.AddField(
            model_name='machine',
            name='replaces',
            field=models.UUIDField(blank=True, help_text='the machine that it was bought to stand in for', null=True),
        ),
        migrations.AddField(
            model_name='poolstate',
            name='pool_memory',
            field=models.JSONField(db_default=models.Value({}, models.JSONField()), default=dict, help_text="of the pool's own turns: PoolMemory"),
        ),
        migrations.AlterField(
            model_name='poolstate',
            name='memory',
            field=models.JSONField(default=dict, help_text='what offers taught: SpotMemory'),
        ),
    ]
