"""Adapters of PEFT store the coupling of the model they were trained on, because they do not fit a model with another one."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

logger = logging.get_logger("transformers.hf_pareprop")

Beta = float | Sequence[float]

FIELD = "auto_mapping"
"""The field of an adapter's configuration in which PEFT saves facts about the base model, if `task_type` is set."""


def note_coupling(adapters: Mapping[str, Any], beta: Beta, steps: str) -> None:
    """Write ``beta`` and ``steps`` of the model into the configurations of its adapters, which are saved with them.

    Args:
        adapters: configurations of PEFT by name.
        beta: as in the configuration of the model.
        steps: as in the configuration of the model.
    """
    for name, adapter in adapters.items():
        setattr(adapter, FIELD, {**(getattr(adapter, FIELD, None) or {}), "beta": beta, "steps": steps})
        if getattr(adapter, "task_type", None) is None:
            logger.warning_once(
                f"the adapter {name!r} names no task_type, so PEFT will not save the beta that it is trained at. Set task_type, or "
                f"remember to load it onto a model with {_coupling(beta, steps)}: to_reversible(base, {_coupling(beta, steps)})."
            )


def check_coupling(adapters: Mapping[str, Any], beta: Beta, steps: str) -> None:
    """
    Raises:
        ValueError: an adapter was trained at another beta, or with other steps.
    """
    for name, adapter in adapters.items():
        noted = getattr(adapter, FIELD, None) or {}
        trained = noted.get("beta", beta), noted.get("steps", "sublayer" if "beta" in noted else steps)
        if trained != (beta, steps):
            raise ValueError(
                f"the adapter {name!r} was trained at {_coupling(*trained)}, and the model has {_coupling(beta, steps)}: load it "
                f"onto to_reversible(base, {_coupling(*trained)}), and change that afterwards (set_beta) if you mean to."
            )


def _coupling(beta: Beta, steps: str) -> str:
    """A coupling as Python arguments. The default ``steps`` is left out."""
    return f"beta={beta}" if steps == "sublayer" else f"beta={beta}, steps={steps!r}"
