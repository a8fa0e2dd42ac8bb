"""What an entry needs so that it can be forgotten and its chain still verify (lifecycle/erasure.py)."""

from django.db import migrations, models

from controlplane.tenants.rls import RunStatements


class Migration(migrations.Migration):

    dependencies = [
        ('audit', '0001_initial'),
    ]

    operations = [
        migrations.AddField(
            model_name='entry',
            name='redacted',
            field=models.BinaryField(help_text='digest of what it said, once that was erased (lifecycle/erasure.py)', max_length=32, null=True),
        ),
        migrations.AddField(
            model_name='entry',
            name='salt',
            field=models.UUIDField(editable=False, help_text='random, in the digest; taken away by a redaction', null=True),
        ),
        # From now on: entries that are sealed already had no salt in their digest.
        RunStatements(
            "ALTER TABLE audit_entry ALTER COLUMN salt SET DEFAULT gen_random_uuid()",
            "ALTER TABLE audit_entry ALTER COLUMN salt DROP DEFAULT",
            what="Salt every new entry",
        ),
    ]
