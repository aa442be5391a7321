"""What the command lines of the benchmarks share."""

import argparse
from pathlib import Path

import torch


def choose_device(args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise ValueError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu, or a GPU and a CUDA build of PyTorch."
        )
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 1 or more is expected")
    return int(text)


def file_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r}: a file name is expected; give the directory with --out")
    return text
