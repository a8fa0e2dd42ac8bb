"""The command `corral` and its options; each command's module is imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any, Final

import click

from controlplane.cli.config import context

FORMS: Final = ("table", "json", "yaml")
# Command to (module, what it does): help needs no imports.
COMMANDS: Final = {
    "login": ("session", "Sign in with a management token"),
    "logout": ("session", "Forget a context and its token"),
    "contexts": ("session", "List contexts, or choose one"),
    "apply": ("apply", "Make the organization look like a file says, after showing the plan"),
    "get": ("get", "Show resources"),
    "keys": ("keys", "Create, list, rotate and revoke API keys"),
    "deployments": ("deployments", "List, scale, follow and drain deployments"),
    "logs": ("logs", "Requests and decisions of a deployment or project, as they come"),
    "usage": ("usage", "Requests, tokens and cost"),
    "explain": ("explain", "Why a request or decision went as it did"),
    "rollouts": ("rollouts", "Try new profiles and model versions on a share of the requests"),
    "profile": ("rollouts", "Show how a deployment runs its model, and why"),
    "doctor": ("doctor", "Check the way to the control plane"),
    "completion": ("completion", "Print the completion script of your shell"),
}


class Session:
    """Options of all commands, and the API made of them at first use."""

    def __init__(self, form: str, context_name: str, url: str) -> None:
        self.form, self.context_name, self.url = form, context_name, url
        self._api: Any = None

    @property
    def api(self) -> Any:
        if self._api is None:
            from controlplane.cli.transport import Api

            self._api = Api(context(self.context_name, self.url))
        return self._api


class Lazy(click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"controlplane.cli.commands.{COMMANDS[cmd_name][0]}")
        found: click.Command = getattr(module, cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-o", "--output", "form", type=click.Choice(FORMS), default="table", help="How to show answers."
)
@click.option("--context", "context_name", default="", help="Context of `corral login` (CORRAL_CONTEXT).")
@click.option("--url", default="", help="Address of the console (CORRAL_API_URL).")
@click.version_option("0.1.0", prog_name="corral")
@click.pass_context
def cli(ctx: click.Context, form: str, context_name: str, url: str) -> None:
    """Provision and watch Corral: tenants, keys, deployments, usage."""
    ctx.obj = Session(form, context_name, url)


def shown_as(command: Any) -> Any:
    """`-o` after the command works too."""

    def take(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value:
            ctx.obj.form = value

    return click.option(
        "-o",
        "--output",
        type=click.Choice(FORMS),
        expose_value=False,
        callback=take,
        help="How to show answers.",
    )(command)


def main() -> None:
    """The entry point of the console script."""
    import sys

    try:
        cli(prog_name="corral")
    except BrokenPipeError:  # `corral … | head`
        sys.stderr.close()
        raise SystemExit(0) from None
