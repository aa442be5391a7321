"""Programs for a process in which hf_pareprop is not installed."""

PREAMBLE = """
import sys

class Block:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "hf_pareprop":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
import torch, transformers
"""
"""Begins a program, for a process of its own, that cannot import the package."""
