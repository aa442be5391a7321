"""The command line of the benchmarks: arguments, defaults by device, and checks that say what to do."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from math import isqrt
from pathlib import Path

import torch
from measure import STATUS

from hf_pareprop.plan import CONVERTED_BETA, plan_layers
from hf_pareprop.tools.families import FAMILIES

CPU_SIZES = {"width": 192, "heads": 4, "batch_size": 2, "length": 256, "repeats": 5}
CUDA_SIZES = {"width": 1024, "heads": 16, "batch_size": 32, "length": 256, "repeats": 20}


def parse(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The arguments, checked, with the defaults of their device filled in; bad ones end the process with status 2."""
    parser = make_parser(description)
    args = parser.parse_args(arguments)
    try:
        choose_device(args)
        for name, value in (CUDA_SIZES if args.device == "cuda" else CPU_SIZES).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        for check in (check_memory, check_families, check_depths, check_sizes, check_beta, check_output):
            check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def choose_device(args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise ValueError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu, or a GPU and a CUDA build of PyTorch."
        )
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"


def check_memory(args: argparse.Namespace) -> None:
    if args.device == "cpu" and not STATUS.exists():
        raise ValueError(f"--device cpu: peak memory is read from {STATUS}, which only Linux has; use --device cuda.")


def check_families(args: argparse.Namespace) -> None:
    args.families = list(dict.fromkeys(args.families))
    for family in args.families:
        if family not in FAMILIES:
            raise ValueError(f"--families {family}: unknown; use one or more of {', '.join(FAMILIES)}.")


def check_depths(args: argparse.Namespace) -> None:
    args.depths = sorted(set(args.depths))
    if len(args.depths) < 2:
        raise ValueError(
            f"--depths {args.depths[0]}: memory per added layer takes two or more different depths; use e.g. "
            f"--depths {args.depths[0]} {2 * args.depths[0]}."
        )


def check_sizes(args: argparse.Namespace) -> None:
    if args.width % args.heads:
        nearest = args.heads * max(1, round(args.width / args.heads))
        raise ValueError(
            f"--width {args.width}: a multiple of --heads {args.heads} is expected; use e.g. --width {nearest}."
        )
    side = isqrt(args.length)
    of_images = [name for name in args.families if FAMILIES[name].takes_images]
    if of_images and side**2 != args.length:
        others = " ".join(name for name in FAMILIES if not FAMILIES[name].takes_images)
        raise ValueError(
            f"--length {args.length}: images of {', '.join(of_images)} are square, so it has to be a square number; use "
            f"{side**2} or {(side + 1) ** 2}, or leave them out with --families {others}."
        )
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout}: a probability below 1 is expected; use e.g. 0 or 0.1.")


def check_beta(args: argparse.Namespace) -> None:
    if args.beta == 0:
        raise ValueError("--beta 0: that is the stock model, of which no layer is reversible; use 1, 0.5, 0.25, …")
    try:
        plan_layers(args.beta, max(args.depths))
    except ValueError as error:
        raise ValueError(f"--beta {args.beta}: {error}") from None


def check_output(args: argparse.Namespace) -> None:
    """Before hours of measuring, not after."""
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib, which draws the plot, is not installed; pip install matplotlib.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out {args.out}: a directory that can be written to is expected, but: {error.strerror}; name another."
        ) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 1 or more is expected")
    return int(text)


def file_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r}: a file name is expected; give the directory with --out")
    return text


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="On the CPU pareprop overlaps rebuilding and gradients only if cores are left for it, that is if "
        "2 x threads <= cores; otherwise it runs as reprop does. On 2 cores --threads 1 shows the overlap. "
        "CUDA_VISIBLE_DEVICES chooses among several GPUs.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if present")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help=f"default: {' '.join(FAMILIES)}")
    parser.add_argument("--depths", nargs="+", type=positive, default=[4, 8, 12, 24], help="default: 4 8 12 24")
    for name, what in (
        ("width", "hidden size"),
        ("heads", "attention heads"),
        ("batch_size", "sequences or images in a step"),
        ("length", "tokens of a text, or patches of an image"),
        ("repeats", "samples of each time"),
    ):
        shown = f"{what}; default: {CPU_SIZES[name]} on the CPU, {CUDA_SIZES[name]} on CUDA"
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=shown)
    parser.add_argument("--dropout", type=float, default=0.0, help="of hidden states and attention; default: 0")
    beta = f"coupling, 1 or 2^-m; default: {CONVERTED_BETA:g}, that of converted models"
    parser.add_argument("--beta", type=float, default=CONVERTED_BETA, help=beta)
    parser.add_argument("--autocast", choices=("none", "bf16"), default="none", help="default: none")
    parser.add_argument("--threads", type=positive, help="PyTorch's threads on the CPU; default: PyTorch's choice")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="directory of the results; default: %(default)s")
    parser.add_argument("--name", type=file_name, help="name of the results; default: engines- and the device's name")
    return parser
