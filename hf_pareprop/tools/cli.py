"""How the command `hf-pareprop` is called. PyTorch is loaded when a command runs, so that `--help` takes a moment.

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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Src = Annotated[str, typer.Argument(metavar="SRC", help="A directory or a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make; it appears whole or not at all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Shards = Annotated[str, typer.Option("--max-shard-size", help="Largest weights file, such as 5GB.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Real inputs: a file with a text per line, an image, or a directory of images; default: random.",
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--data",
        "--calibrate",
        help="Measure on real inputs: a file with a text per line, an image, or a directory of images.",
    ),
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens; longer texts are truncated.")]
Device = Annotated[str, typer.Option(help="auto: CUDA if there is one.")]


@app.command()
def convert(
    src: Src,
    out: Out,
    beta: Annotated[
        float | None, typer.Option(help="Coupling: 1, 0.5, 0.25, …; smaller is closer to SRC; default: 1/32.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Only these layers become reversible: 4-11, or 0-3,8-11. Others store activations."),
    ] = None,
    grid_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits after the binary point of the states, which stay below 2**(30 - bits); default: 16, or with --data the "
            "finest that holds eight times what they reach."
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights written; auto: as they are.")] = "auto",
    data: Calibrate = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (tensors only).")] = False,
    overwrite: Overwrite = False,
    max_shard_size: Shards = "5GB",
) -> None:
    """Make a reversible checkpoint of a stock one, holding one tensor in memory at a time (but with --data the model)."""
    _run("convert", locals())


@app.command()
def export(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A reversible checkpoint: a directory or a Hub id.")],
    out: Out,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights written; auto: as they are.")] = "auto",
    data: Calibrate = None,
    overwrite: Overwrite = False,
    max_shard_size: Shards = "5GB",
) -> None:
    """Make a stock checkpoint of a reversible one, for plain transformers, or for timm if that has the stock model.

    The fidelity is measured on --data, or else on random inputs, which say little about real ones.
    """
    _run("export", locals())


@app.command()
def verify(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A reversible checkpoint: a directory or a Hub id.")
    ],
    data: Data = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs in the step.")] = 4,
    max_length: MaxLength = 128,
    engine: Annotated[Literal["reprop", "pareprop"], typer.Option(help="The engine to verify.")] = "pareprop",
    autocast: Annotated[Literal["none", "bf16"], typer.Option(help="Compute in bf16 autocast.")] = "none",
    device: Device = "auto",
) -> None:
    """Check a training step here: rebuilt states, gradients, memory. Exit status 1 if something does not hold."""
    _run("verify", locals())


@app.command()
def bench(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, stock or reversible: a directory or a Hub id.")
    ],
    data: Data = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The batch size that you want to train with.")] = 8,
    max_length: MaxLength = 128,
    memory_cap: Annotated[
        str | None, typer.Option(help="What training may take, such as 16GB; default: the device's memory.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Coupling of the reversible model, measured beside 1; default: 1/32.")
    ] = None,
    autocast: Annotated[
        Literal["auto", "none", "bf16"], typer.Option(help="Compute in bf16 autocast; auto: on CUDA.")
    ] = "auto",
    device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also torch.compile, in three ways: minutes more.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each time; fewer if that takes minutes.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="A directory to make, for bench.json and bench.png; default: none.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare what you could train this model with on this machine, and recommend one: a few minutes."""
    _run("bench", locals())


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
    """Run what :mod:`commands` has under that name."""
    importlib.import_module("hf_pareprop").load()
    logging = importlib.import_module("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the errors that it logs are raised as well
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(PIL|torch|transformers|numpy)\b")
            getattr(importlib.import_module("hf_pareprop.tools.commands"), command)(**options)
    finally:
        logging.set_verbosity(verbosity)


def main() -> None:
    """Entry point: errors are one line on stderr and exit status 1."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every system has both
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    try:
        app()
    except Exception as error:
        sys.exit(f"error: {_in_words(error)}")


def _stop(number: int, frame: Any) -> None:
    """Leave as by an exception, so that nothing half-written stays behind."""
    print(f"error: stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


def _in_words(error: Exception) -> str:
    """What a user can mend says it itself; anything else with what it is."""
    from .source import one_line

    name, text = type(error).__name__, one_line(error)
    return text if text == name or isinstance(error, (ValueError, TypeError, OSError)) else f"{name}: {text}"


if __name__ == "__main__":
    main()
