"""The commands and how they end: errors are one line on stderr."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .converting import convert_command
from .listing import list_command

BAD_INPUT = 2

app = typer.Typer(
    name="argen", help="Autoregressive image generation from published checkpoints.", add_completion=False
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"hf_argen {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("convert")
def _convert(
    source: Annotated[
        str,
        typer.Argument(metavar="PRESET_OR_FAMILY", help="A released checkpoint, or a family with --file."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=PATH", help="A file of your own, for example tokenizer=vae.pth."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE.KEY=VALUE|JSON_FILE",
            help="The authors' constructor arguments that the weights do not tell.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it holds something.")] = False,
) -> None:
    """Convert the authors' checkpoint to a folder that from_pretrained() opens.

    argen convert var-d16 OUT

    argen convert var OUT --file transformer=var.pth --file tokenizer=vae.pth
    """
    convert_command(source, out, file or [], config or [], force)


@app.command("list")
def _list() -> None:
    """List families, released checkpoints and decodings."""
    list_command()


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command.

    Args:
        arguments: without the program's name; default: those of this process.

    Returns:
        The exit status: 0, 2 for bad input, 1 for anything else that failed. With ARGEN_DEBUG=1 in the
        environment errors are raised instead.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return typer.main.get_command(app).main(arguments, prog_name="argen", standalone_mode=False) or 0
    except typer.Abort:
        return _fail("interrupted", 130)
    except typer.TyperException as error:
        return _fail(error.format_message(), BAD_INPUT)
    except Exception as error:
        if os.environ.get("ARGEN_DEBUG") == "1":
            raise
        # Bad input reaches us as a ValueError, what the system refuses (disk, memory) as anything else.
        return _fail(str(error) or type(error).__name__, BAD_INPUT if isinstance(error, ValueError) else 1)


def _fail(message: str, status: int) -> int:
    typer.echo(f"argen: {' '.join(message.split())}", err=True)
    return status
