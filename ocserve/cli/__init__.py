"""The command line: one file per command, imported when the command is used.

Names and one-line helps stand in a table here, so that `ocserve --help` loads nothing heavy. Whatever the layers below
refuse with a message and a hint is shown as two lines on stderr, or with `--json` as one JSON object there: stdout
holds results only.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import IO, Any

import click

from ocserve import __version__

COMMANDS = {
    "run": "Serve a model on localhost.",
    "pull": "Bring a model to this machine.",
    "list": "List the models on this machine, or the catalogue.",
    "show": "Show what is known of a model.",
    "rm": "Remove a model from this machine.",
    "ps": "Show the models of a running server.",
    "load": "Have a running server load a model.",
    "unload": "Have a running server unload a model.",
    "reload": "Have a running server read its settings anew.",
    "drain": "Have a running server take nothing more.",
    "maintenance": "Announce maintenance of a running server.",
    "stop": "End a running server.",
    "keys": "Make, list, limit, credit, rotate and revoke keys.",
    "tune": "Measure what suits this machine, and keep it.",
    "config": "Show every setting and where it comes from.",
    "doctor": "Check this machine and this installation.",
    "usage": "Show what was used and what it cost.",
    "privacy": "Delete what is kept of requests.",
    "bench": "Measure a server, or compare two.",
    "check": "Audit a server against the checklists for providers.",
}


_AS_JSON = "ocserve.json"


class Failure(click.ClickException):
    """A command ends with what happened and what helps, on stderr; `as_json` is set where the command speaks JSON."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.as_json = False

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        if self.as_json:
            described = {"error": {"message": self.message, "hint": self.hint}}
            click.echo(json.dumps(described), file=file, err=file is None)
            return
        click.echo(f"error: {self.message}", file=file, err=file is None)
        if self.hint:
            click.echo(f"hint: {self.hint}", file=file, err=file is None)


class ConfigFailure(Failure):
    """The settings are wrong: starting again will not help, and service managers should not try."""

    exit_code = 78  # EX_CONFIG of sysexits.h


class MistypedCommand(Failure):
    """What was typed is not a command, or not an option or argument of it."""

    exit_code = click.UsageError.exit_code


class Commands(click.Group):
    """The commands of the table, each loaded from the module of its name when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table: what is used most comes first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"ocserve.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the table without loading what it names."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches  # only on the way to an error

            near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean `ocserve {near[0]}`?" if near else "`ocserve --help` lists the commands"
            raise MistypedCommand(f"there is no command `{name}`", hint)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether the command is to speak JSON: its own options are not read yet when it fails early."""
        ctx.meta[_AS_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a refusal by a layer below becomes a failure of the command."""
        try:
            return self._invoke(ctx)
        except Failure as failure:
            failure.as_json = ctx.meta[_AS_JSON]
            raise
        except click.UsageError as error:
            if not ctx.meta[_AS_JSON]:
                raise  # click shows the command's usage with it
            mistyped = MistypedCommand(error.format_message())
            mistyped.as_json = True
            raise mistyped from None

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output has gone; Python must not complain about it again while it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(Failure.exit_code) from None
        except Exception as error:
            failure = _as_failure(error)
            if failure is None:
                raise
            raise failure from error


def _as_failure(error: Exception) -> Failure | None:
    """What a refusal says, or None for anything that is not one. The layers were loaded by whoever raised it."""
    from ocserve.config import ConfigError

    if isinstance(error, ConfigError):
        return ConfigFailure(error.message, error.hint)
    catalog = sys.modules.get("ocserve.catalog.errors")
    if catalog is not None and isinstance(error, catalog.CatalogError):
        return Failure(error.message, error.hint)
    return None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ocserve", message="%(prog)s %(version)s")
def main() -> None:
    """Serve language models on this machine, with a provider's promises."""
