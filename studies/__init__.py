"""Finished studies of what conversion costs and of training from scratch. `python -m studies.NAME` runs one again."""

import sys
from pathlib import Path

# Studies use data sets and functions of the examples.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
