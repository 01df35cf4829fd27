"""`ocserve config show`: every setting, its value, and where the value comes from."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("config")
def command() -> None:
    """Show every setting and where it comes from."""


@command.command("show")
@click.option("--describe", is_flag=True, help="Print below each what it is for; --json always says it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(describe: bool, as_json: bool) -> None:
    """Print every setting, its value and its origin. Of secrets only whether they are set."""
    from ocserve import config
    from ocserve.cli.tables import readable

    settings = config.load()
    known = config.catalogue()
    if as_json:
        import msgspec

        rows = {
            name: {
                "value": str(value) if isinstance(value, Path) else value,
                "origin": origin,
                "variable": known[name].variable,
                "description": known[name].description,
                **({"fields": fields} if (fields := known[name].fields) else {}),
            }
            for name, value, origin in settings
        }
        click.echo(msgspec.json.encode({"file": str(settings.path), "settings": rows}))
        return
    shown = [(name, readable(value), origin) for name, value, origin in settings]
    name_width = max(len(name) for name, _, _ in shown)
    value_width = min(40, max(len(value) for _, value, _ in shown))
    click.echo(f"# {settings.path}{'' if settings.path.exists() else ' (does not exist)'}")
    for name, value, origin in shown:
        click.echo(f"{name:{name_width}}  {value:{value_width}}  {origin}")
        if describe:
            click.echo(f"# {known[name].description}")
            for field, text in known[name].fields.items():
                click.echo(f"#   {field}: {text}")
    policy = settings.config.policy
    if policy.checks and (judge := " ".join(policy.command) or policy.url):
        click.echo(f"# The content of every {' and '.join(policy.checks)} is shown to {judge}")
