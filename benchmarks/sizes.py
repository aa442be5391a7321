"""The models that the throughput benchmark trains: the published sizes of each family, and each twice as deep."""

from typing import Any

from hf_pareprop.tools.contenders import STOCK, Subject
from hf_pareprop.tools.families import FAMILIES
from hf_pareprop.tools.inputs import random_batch, with_targets

DEEP = "-deep"
"""What the name of a size ends with that has twice its layers."""

SIZES = {
    name: (family, shape._replace(depths=tuple(times * depth for depth in shape.depths)))
    for family in FAMILIES.values()
    for base, shape in family.sizes.items()
    for name, times in ((base, 1), (base + DEEP, 2))
}


def sample(size: str, length: int) -> dict[str, Any]:
    """One random input of the model called ``size``, with a label; a text has ``length`` tokens."""
    model = subject(size, depth=1).build(STOCK)
    return with_targets(random_batch(model, batch_size=1, length=length), model)


def subject(size: str, depth: int | None = None) -> Subject:
    """The model called ``size``; with ``depth`` layers in its deepest stage instead of its own, if given."""
    family, shape = SIZES[size]
    fields = {} if depth is None else family.config_class.depth_fields(depth, len(shape.depths))
    return Subject(family.classifier, family.config(shape, **fields))
