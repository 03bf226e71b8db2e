"""Intruder dimensions: the update that is left, against PEFT's, and what is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, get_peft_model, inject
from minilora.errors import ConfigError, KindError, StateError
from minilora.lora.slots import adapters_of
from minilora.many.intruders import reduce_intruder_dimension
from tests.compare import close
from tests.models import lora, randomize

FIELDS = {"r": 3, "lora_alpha": 12, "target_modules": ["0", "1"], "rank_pattern": {"1": 2}}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7)).eval()


@pytest.mark.parametrize(("top_k", "epsilon", "share"), [(10, 0.5, 0.75), (10, 0.9, 0.2), (2, 999, 0.5), (3, 0.8, 0.0)])
def test_what_is_left_of_the_update_is_that_of_peft(top_k, epsilon, share):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs

    model = randomize(get_peft_model(base(), LoraConfig(**FIELDS)))
    other = peft.get_peft_model(base(), peft.LoraConfig(**FIELDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.set_peft_model_state_dict(other, minilora.get_peft_model_state_dict(model))
    kept = copy.deepcopy(minilora.get_peft_model_state_dict(model))
    mine, said = [], []
    words = {"top_k": top_k, "threshold_epsilon": epsilon, "mitigation_lambda": share}
    reduce_intruder_dimension(model, **words, logging_sink=mine.append)
    theirs(other, **words, logging_sink=said.append)
    assert [line.split(": ", 1)[-1] for line in mine] == [line.split(": ", 1)[-1] for line in said]
    assert any("Intruders" in line for line in mine)
    assert adapters_of(model).active == ("intruder_reduced",)
    for path in "01":
        got = adapters_of(model).named("intruder_reduced")[path]
        layer = other.base_model.model[int(path)]
        close(got.delta_weight(), layer.get_delta_weight("intruder_reduced"), 1e-4)
        close(got.lora_A.abs(), layer.lora_A["intruder_reduced"].weight.abs(), 1e-3)
    for key, value in minilora.get_peft_model_state_dict(model).items():
        assert torch.equal(value, kept[key])


def test_without_intruders_the_adapter_is_copied():
    model = randomize(inject(base(), LoraConfig(**FIELDS)))
    reduce_intruder_dimension(model, threshold_epsilon=0, logging_sink=None)
    for path in "01":
        old, new = (adapters_of(model).named(name)[path] for name in ("default", "intruder_reduced"))
        assert (
            torch.equal(old.lora_A, new.lora_A) and torch.equal(old.lora_B, new.lora_B) and old.lora_A is not new.lora_A
        )


def test_an_embedding_keeps_its_shapes():
    torch.manual_seed(0)
    model = randomize(inject(nn.Sequential(nn.Embedding(11, 6)).eval(), lora(["0"])))
    want = adapters_of(model).named("default")["0"].delta_weight()
    reduce_intruder_dimension(model, threshold_epsilon=999, mitigation_lambda=1.0)
    new = adapters_of(model).named("intruder_reduced")["0"]
    close(new.delta_weight(), want, 1e-4)
    assert not torch.equal(new.lora_embedding_A, adapters_of(model).named("default")["0"].lora_embedding_A)


def test_what_is_refused():
    for fields, kind in (
        ({"use_dora": True}, KindError),
        ({"lora_bias": True}, StateError),
        ({"bias": "all"}, StateError),
    ):
        model = inject(base(), LoraConfig(**FIELDS, **fields))
        with pytest.raises(kind):
            reduce_intruder_dimension(model)
        assert list(adapters_of(model).configs) == ["default"]
    model = inject(base(), LoraConfig(**FIELDS))
    for words in ({"top_k": 0}, {"threshold_epsilon": -1}, {"mitigation_lambda": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(words))):
            reduce_intruder_dimension(model, **words)
