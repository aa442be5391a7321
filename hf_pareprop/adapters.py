"""Adapters of PEFT remember the coupling that they were trained at: on a model with another one they compute something else."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

logger = logging.get_logger("transformers.hf_pareprop")

Beta = float | Sequence[float]

FIELD = "auto_mapping"
"""Of an adapter's configuration, where PEFT writes what it is told about the base model, if it is told what its task is."""


def note_beta(adapters: Mapping[str, Any], beta: Beta) -> None:
    """Have adapters saved with the ``beta`` of their model.

    Args:
        adapters: configurations of PEFT by name.
    """
    for name, adapter in adapters.items():
        setattr(adapter, FIELD, {**(getattr(adapter, FIELD, None) or {}), "beta": beta})
        if getattr(adapter, "task_type", None) is None:
            logger.warning_once(
                f"the adapter {name!r} names no task_type, so PEFT will not save the beta that it is trained at. Set task_type, or "
                f"remember to load it onto a model with beta={beta}: to_reversible(base, beta={beta})."
            )


def check_beta(adapters: Mapping[str, Any], beta: Beta) -> None:
    """
    Raises:
        ValueError: an adapter was trained at another beta.
    """
    for name, adapter in adapters.items():
        trained_at = (getattr(adapter, FIELD, None) or {}).get("beta", beta)
        if trained_at != beta:
            raise ValueError(
                f"the adapter {name!r} was trained at beta={trained_at}, and the model has beta={beta}: load it onto "
                f"to_reversible(base, beta={trained_at}), and change that with set_beta afterwards if you mean to."
            )
