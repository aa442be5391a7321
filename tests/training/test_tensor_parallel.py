"""Tensor parallelism is refused before anything is loaded. Arguments that do not ask for it are accepted."""

import pytest
from families import FAMILIES
from transformers import AutoModelForImageClassification

from hf_pareprop.processes import check_not_tensor_parallel


class DistributedConfig:
    """The part of the class that matters here. Some versions of transformers do not have it."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    "asked",
    [
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"tp_plan": {"vit.encoder.layer.*.intermediate.dense": "colwise"}},
        {"distributed_config": DistributedConfig(tp_size=2, tp_plan=None)},
        {"distributed_config": DistributedConfig(tp_plan="auto")},
        {"distributed_config": {"tp_size": 4}},
    ],
)
def test_it_is_refused(asked):
    with pytest.raises(ValueError, match=r"^tp_(plan|size)=.* no tensor parallelism.*FSDP2"):
        check_not_tensor_parallel(asked)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"tp_plan": None, "tp_size": None},
        {"tp_size": 1},
        {"distributed_config": DistributedConfig(tp_size=1, tp_plan={}, fsdp_size=2)},
    ],
)
def test_nothing_else_is(asked):
    check_not_tensor_parallel(asked)


def test_loading_refuses_it(family, tmp_path):
    family.build(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tp_plan='auto'.*FSDP2"):
        family.model.from_pretrained(tmp_path, tp_plan="auto")


def test_auto_classes_refuse_it(tmp_path):
    FAMILIES["vit"].build(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tp_size=2.*FSDP2"):
        AutoModelForImageClassification.from_pretrained(tmp_path, tp_size=2)
