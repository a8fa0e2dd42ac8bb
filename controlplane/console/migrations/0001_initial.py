"""Failed sign-ins."""

from django.db import migrations, models

from controlplane.tenants.rls import ALL, Grant


class Migration(migrations.Migration):
    initial = True

    dependencies = [("tenants", "0002_isolation")]

    operations = [
        migrations.CreateModel(
            name="SignInFailures",
            fields=[
                ("subject", models.BinaryField(help_text="SHA-256", max_length=32, primary_key=True, serialize=False)),
                ("n_failures", models.PositiveSmallIntegerField()),
                ("since", models.DateTimeField(db_index=True)),
            ],
        ),
        Grant("SignInFailures", app=ALL),
    ]
