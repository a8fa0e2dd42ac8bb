"""A second certificate of a SAML provider, good beside the first while that is replaced."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('identity', '0004_scim_choices'),
    ]

    operations = [
        migrations.AddField(
            model_name='identityprovider',
            name='next_certificate',
            field=models.TextField(blank=True, db_default='', default='', help_text='SAML only: of what it will sign with, accepted already'),
        ),
    ]
