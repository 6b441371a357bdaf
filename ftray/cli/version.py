"""`ftray version`."""

from importlib.metadata import PackageNotFoundError, version

import typer

PACKAGES = ("ftray", "torch", "ray", "transformers", "peft", "safetensors", "tokenizers", "pyarrow")


def command() -> None:
    """Print the versions of ftray and of what it stands on."""
    for package in PACKAGES:
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} not installed")
