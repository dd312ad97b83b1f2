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
from .request import DrawRequest

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


@app.command("generate")
def _generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="What to draw, one row of pictures each."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", "--count", help="Pictures of each prompt. Default: 1.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder, released checkpoint or Hub repository. Default: the one that comes with the package."
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME_OR_ID", help="For models that draw classes; may be repeated."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="File (.png .jpg .webp .gif), or without suffix a folder of PNGs."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the first picture; the i-th has seed + i. Default: random.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off. Default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off. Default: the model's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    decoding: Annotated[
        str | None, typer.Option(help="A name ('argen list' shows them) or JSON. Default: the model's.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16. Default: auto.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="8bit or 4bit, by bitsandbytes.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")] = None,
    animate: Annotated[
        bool, typer.Option("--animate", help="Also a GIF of the pictures as they form.")
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE", help="Draw what this picture shows once more; other options change it."
        ),
    ] = None,
) -> None:
    """Draw pictures.

    argen generate "red apple" -n 8 -o apples.png

    argen generate --model var-d16 --class "red fox" --class volcano -o out --animate
    """
    from .generating import again as request_behind
    from .generating import generate_command

    request = DrawRequest() if again is None else request_behind(again)
    if prompts or classes:
        request.prompts, request.classes = prompts or [], classes or []
    if prompts or classes or count is not None or seed is not None:
        request.company = None  # these are other pictures than that one
    if model is not None:
        request.weights = None
    given = {
        "model": model,
        "count": count,
        "seed": seed,
        "guidance": guidance,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
        "decoding": decoding,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
    }
    for name, value in given.items():
        if value is not None:
            setattr(request, name, value)
    generate_command(request, out, animate)


@app.command("sample")
def _sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw, in place of --list.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="NAME.npz for FID tools, or a folder of PNGs.")
    ] = Path("samples"),
    count: Annotated[int, typer.Option("-n", "--count", help="Pictures of each prompt or class.")] = 1,
    model: Annotated[str | None, typer.Option(help="As for argen generate.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME_OR_ID", help="May be repeated.")
    ] = None,
    conditions: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="One prompt or class a line.")
    ] = None,
    all_classes: Annotated[bool, typer.Option("--all-classes", help="Every class of the model.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first picture; the i-th of all has seed + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures that are drawn together.")] = 16,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off. Default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off. Default: the model's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    decoding: Annotated[str | None, typer.Option(help="A name or JSON. Default: the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="8bit or 4bit, by bitsandbytes.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ... Default: a GPU for each process if there are any.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew where OUT holds another run.")] = False,
) -> None:
    """Draw many pictures, on one or many processes; the same command goes on after an interruption.

    argen sample --model var-d16 --all-classes -n 50 -o samples.npz

    accelerate launch --num_processes 8 -m hf_argen.cli sample --model var-d16 --all-classes -n 50 -o samples.npz
    """
    from .sampling import SampleRequest, sample_command

    request = SampleRequest(
        model=model,
        prompts=prompts or [],
        classes=classes or [],
        count=count,
        seed=seed,
        guidance=guidance,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        decoding=decoding,
        dtype=dtype,
        quantize=quantize,
        device=device,
        batch=batch,
    )
    sample_command(request, out, conditions, all_classes, force)


@app.command("info")
def _info(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL_OR_PICTURE]",
            help="Folder, released checkpoint, Hub repository, or a picture that argen generate wrote.",
        ),
    ] = None,
) -> None:
    """Describe a model without loading its weights, or tell how a picture was made."""
    from .informing import info_command

    info_command(source)


@app.command("push")
def _push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved or converted model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPOSITORY", help="OWNER/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made now: only for you.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if there is none. Default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Of the commit.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Propose it instead.")] = False,
) -> None:
    """Push a model to the Hub, whole and in one commit.

    argen push OUT me/var-d16
    """
    from .pushing import push_command

    push_command(folder, repo_id, private, revision, message, pull_request)


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
    except typer.Abort as error:
        return _fail(str(error) or "interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer, whose class has another name in every few versions
            return _fail(error.format_message(), BAD_INPUT)
        if os.environ.get("ARGEN_DEBUG") == "1":
            raise
        # Bad input reaches us as a ValueError, what the system refuses (disk, memory) as anything else.
        return _fail(str(error) or type(error).__name__, BAD_INPUT if isinstance(error, ValueError) else 1)


def _fail(message: str, status: int) -> int:
    typer.echo(f"argen: {' '.join(message.split())}", err=True)
    return status
