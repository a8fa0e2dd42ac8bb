"""What a key is bound to, its own names of models, its tags, where it was made."""

from django.db import migrations, models

from controlplane.tenants.rls import EditFunction


class Migration(migrations.Migration):

    dependencies = [
        ('tenants', '0005_management'),
        ('deployments', '0005_cell'),
    ]

    operations = [
        migrations.AddField(
            model_name='apikey',
            name='aliases',
            field=models.JSONField(blank=True, help_text='other names of models, for this key: {alias: name}', null=True),
        ),
        migrations.AddField(
            model_name='apikey',
            name='origin',
            field=models.CharField(blank=True, db_default='', default='', help_text='where it was made, if elsewhere', max_length=16),
        ),
        migrations.AddField(
            model_name='apikey',
            name='scopes',
            field=models.JSONField(blank=True, help_text='what it is bound to (key_scopes.py); null = nothing', null=True),
        ),
        migrations.AddField(
            model_name='apikey',
            name='tags',
            field=models.JSONField(blank=True, help_text='words to find it by', null=True),
        ),
        EditFunction(
            "corral_key_lookup(text)",
            "'name', k.name,",
            "'name', k.name,\n            'scopes', k.scopes,\n            'aliases', k.aliases,",
            what="Gateways are told what a key is bound to",
        ),
    ]
