"""Reuse transformers' decision whether attention needs a mask. It reads the batch for that, which a capture cannot do."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

from transformers import masking_utils

LOOKS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa", "find_packed_sequence_indices")
"""Functions of transformers that read tensors on the host. In the capture of a CUDA graph they assume the worst."""


class MaskDecisions:
    """The decisions of an ordinary forward pass, for the same forward pass in a capture.

    Transformers leaves out an attention mask that hides nothing. In a capture it cannot know that, so it makes every mask, and
    attention runs on slower kernels that keep more memory and round differently. For batches without a mask and positions,
    the decisions depend on the shape alone, so they are reused. For other batches the ordinary pass makes every mask too, so
    that both run the same kernels, which draw the same random numbers.

    Args:
        names: the names of the tensors in a batch.
    """

    def __init__(self, names: Iterable[str]):
        self._same_for_all = not any("mask" in name or "position" in name for name in names)
        self._found: list[tuple[str, Any]] = []

    @contextmanager
    def learned(self) -> Iterator[None]:
        """A context for an ordinary forward pass, whose decisions are noted; or are those of a capture, see above."""
        self._found.clear()
        makes_every_mask = not self._same_for_all and hasattr(masking_utils, "is_tracing")
        as_in_a_capture = patch.object(masking_utils, "is_tracing", lambda tensor=None: True)
        with self._instead(self._look), as_in_a_capture if makes_every_mask else nullcontext():
            yield

    @contextmanager
    def followed(self) -> Iterator[None]:
        """A context for the same forward pass in a capture, where the noted decisions are used."""
        left = deque(self._found)
        with self._instead(partial(self._recall, left)):
            yield

    @contextmanager
    def _instead(self, function: Callable[..., Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in LOOKS if self._same_for_all else ():
                if (look := getattr(masking_utils, name, None)) is not None:
                    stack.enter_context(patch.object(masking_utils, name, partial(function, name, look)))
            yield

    def _look(self, name: str, look: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = look(*args, **kwargs)
        self._found.append((name, found))
        return found

    @staticmethod
    def _recall(left: deque[tuple[str, Any]], name: str, look: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not left or left[0][0] != name:
            raise RuntimeError(
                f"a captured forward pass makes other attention masks ({name}) than the ordinary pass before: it has to run "
                "the same code every time."
            )
        return left.popleft()[1]
