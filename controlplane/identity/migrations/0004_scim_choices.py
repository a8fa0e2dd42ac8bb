"""What happens to the keys of people whom the directory deactivates."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('identity', '0003_single_sign_on'),
    ]

    operations = [
        migrations.AddField(
            model_name='signinpolicy',
            name='revoke_keys_of_leavers',
            field=models.BooleanField(db_default=False, default=False, help_text='API keys of who is deactivated by SCIM are revoked with their place'),
        ),
    ]
