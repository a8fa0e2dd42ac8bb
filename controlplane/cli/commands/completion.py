"""`corral completion SHELL`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from controlplane.cli.main import cli


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
      bash: corral completion bash > ~/.local/share/bash-completion/completions/corral
      zsh:  corral completion zsh > "${fpath[1]}/_corral"
      fish: corral completion fish > ~/.config/fish/completions/corral.fish
    """
    found = get_completion_class(shell)
    if found is None:  # pragma: no cover - the choices are click's own
        raise click.UsageError(f"no completion for {shell}")
    click.echo(found(cli, {}, "corral", "_CORRAL_COMPLETE").source())
