"""The options of the command `hf-pareprop`. PyTorch is loaded only when a command runs, so that `--help` is fast.

What the commands do is in :mod:`commands`.
"""

import importlib
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..version import __version__

app = typer.Typer(
    help="Reversible Transformers: stock checkpoints in and out, checked on your own machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

UsageError: Any = typer.BadParameter.__base__
"""The error for bad options and arguments. Click has it, or Typer itself in newer versions."""

LARGEST = 10**6
"""The largest number that is accepted for inputs of a batch, tokens of an input, and samples of a time."""


def _path(text: str) -> Path:
    if not text:  # an empty path would be the current directory
        raise typer.BadParameter("it is empty: name a path.")
    return Path(text)


Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Type of the written weights; auto: unchanged."),
]
Src = Annotated[str, typer.Argument(metavar="SRC", help="A directory or a Hub id.")]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", parser=_path, help="The directory to make; it appears whole or not at all.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Shards = Annotated[str, typer.Option("--max-shard-size", help="Largest weights file, such as 5GB.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=_path,
        metavar="PATH",
        help="Real inputs: a file with a text per line, an image, or a directory of images; default: random.",
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--data",
        "--calibrate",
        parser=_path,
        metavar="PATH",
        help="Measure on real inputs: a file with a text per line, an image, or a directory of images.",
    ),
]
MaxLength = Annotated[int, typer.Option(min=1, max=LARGEST, help="Most tokens of a text; longer texts are truncated.")]
Device = Annotated[str, typer.Option(help="auto: CUDA if there is one.")]


@app.command()
def convert(
    src: Src,
    out: Out,
    beta: Annotated[
        float | None,
        typer.Option(
            help="Coupling: 1, 0.5, 0.25, …; smaller is closer to SRC; default: 1/32, or 1/128 if whole layers are coupled."
        ),
    ] = None,
    steps: Annotated[
        Literal["sublayer", "layer"] | None,
        typer.Option(
            help="What is coupled: the sub-blocks of layers, or whole layers; default: sub-blocks in encoders that hf_pareprop has "
            "layers for, otherwise whole layers."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Only these layers become reversible: 4-11, or 0-3,8-11. Others store activations."),
    ] = None,
    grid_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits after the binary point of the states, which have to stay below 2**(30 - bits); default: 16, or 12 with layers "
            "of stock models; with --data the largest number that leaves room for eight times the largest state."
        ),
    ] = None,
    dtype: Dtype = "auto",
    data: Calibrate = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (tensors only).")] = False,
    overwrite: Overwrite = False,
    max_shard_size: Shards = "5GB",
) -> None:
    """Make a reversible checkpoint from a stock one. Only one tensor is in memory at a time; with --data the whole model."""
    _run("convert", locals())


@app.command()
def export(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A reversible checkpoint: a directory or a Hub id.")],
    out: Out,
    dtype: Dtype = "auto",
    data: Calibrate = None,
    overwrite: Overwrite = False,
    max_shard_size: Shards = "5GB",
) -> None:
    """Make a stock checkpoint from a reversible one, for transformers, or for timm if timm has the stock model.

    The fidelity is measured on --data. Without it random inputs are used, which say little about real ones.
    """
    _run("export", locals())


@app.command()
def verify(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A reversible checkpoint: a directory or a Hub id.")
    ],
    data: Data = None,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, help="Inputs in the step.")] = 4,
    max_length: MaxLength = 128,
    engine: Annotated[Literal["reprop", "pareprop"], typer.Option(help="The engine to verify.")] = "pareprop",
    autocast: Annotated[Literal["none", "bf16"], typer.Option(help="Compute in bf16 autocast.")] = "none",
    device: Device = "auto",
) -> None:
    """Check a training step on this machine: rebuilt states, gradients, memory. The exit status is 1 if a check fails."""
    _run("verify", locals())


@app.command()
def bench(
    context: typer.Context,
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, stock or reversible: a directory or a Hub id.")
    ],
    data: Data = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="The batch size that you want to train with.")
    ] = 8,
    max_length: MaxLength = 128,
    memory_cap: Annotated[
        str | None, typer.Option(help="Memory that training may take, such as 16GB; default: the device's memory.")
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Coupling of the reversible model, in addition to 1; default: that of converted weights."),
    ] = None,
    autocast: Annotated[
        Literal["auto", "none", "bf16"], typer.Option(help="Compute in bf16 autocast; auto: on CUDA.")
    ] = "auto",
    device: Device = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Also measure compiled code, on a GPU in CUDA graphs, which takes minutes longer.",
        ),
    ] = True,
    rounds: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Timed steps of each way; fewer if they take minutes.")
    ] = 5,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="PATH", help="Directory to make for bench.json and bench.png; default: none."
        ),
    ] = None,
    overwrite: Overwrite = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Measure nothing, but compute from the configuration of a decoder (Llama, Mistral, Qwen2, Qwen3) how much memory "
            "training takes. Knows meta-llama/Llama-3.2-1B, meta-llama/Llama-3.1-8B and Qwen/Qwen3-4B without the Hub.",
        ),
    ] = False,
) -> None:
    """Compare ways to train this model on this machine, and recommend one. Takes a few minutes."""
    options = {name: value for name, value in context.params.items() if name != "plan"}
    if not plan:
        return _run("bench", options)
    given = {
        name: value
        for name, value in options.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    if others := given.keys() - {"model_name", "beta", "max_length", "memory_cap"}:
        raise typer.BadParameter(
            f"--plan takes --beta, --max-length and --memory-cap; leave out {', '.join(sorted(map(_option, others)))}."
        )
    _run("plan", given)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-pareprop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _run(command: str, options: dict[str, Any]) -> None:
    """Run the function of :mod:`commands` with this name."""
    importlib.import_module("hf_pareprop").load()
    logging = importlib.import_module("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # transformers also raises the errors that it logs
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(PIL|torch|transformers|numpy)\b")
            getattr(importlib.import_module("hf_pareprop.tools.commands"), command)(**options)
    finally:
        logging.set_verbosity(verbosity)


def main() -> None:
    """The entry point. An error is one line on stderr, with exit status 1, or 2 for a wrong option."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # some systems lack one of the signals
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        context = error.ctx.command_path if error.ctx else "hf-pareprop"
        print(f"error: {' '.join(error.format_message().split()).rstrip('.')}. See {context} --help.", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        sys.exit(f"error: {_in_words(error)}")
    sys.exit(code or 0)


def _stop(number: int, frame: Any) -> None:
    """Exit by an exception, so that half-written files are removed."""
    print(f"error: stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


def _in_words(error: Exception) -> str:
    """The message of an error that a user can fix; for any other error its type and its message."""
    from .source import one_line

    name, text = type(error).__name__, one_line(error)
    return text if text == name or isinstance(error, (ValueError, TypeError, OSError)) else f"{name}: {text}"


if __name__ == "__main__":
    main()
