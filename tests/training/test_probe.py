"""A model that sees the tokens it is to predict is refused by name, before anything is written; one that does not is left alone."""

import pytest
import torch

import minilora.training.loop as loop
from minilora import inject
from minilora.data.encoding import Encoded
from minilora.errors import StateError
from minilora.training.probe import refuse_reading_ahead
from minilora.training.settings import TrainConfig
from tests.models import gpt2, llama, lora

transformers = pytest.importorskip("transformers")

EXAMPLES = [Encoded(tuple(ids), tuple(ids)) for ids in [range(3, 40), [7, 9], [5] * 9]]
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 48, "pad_token_id": 1, "initializer_range": 0.3}  # fmt: skip
ENCODERS = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM", "electra": "ElectraForCausalLM"}


def encoder(kind, **fields):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, **fields)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused_by_name_before_anything_is_written(kind, dtype, tmp_path):
    model = inject(encoder(kind).to(dtype), lora(["query", "value"]))
    modes = [module.training for module in model.modules()]
    with pytest.raises(StateError, match=rf"^{ENCODERS[kind]} reads ahead: .*is_decoder=true") as caught:
        loop.train(model, EXAMPLES, TrainConfig(steps=1), tmp_path / "run", 1)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    assert modes == [module.training for module in model.modules()]


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_same_as_a_decoder_trains(kind, tmp_path):
    model = inject(encoder(kind, is_decoder=True), lora(["query", "value"]))
    loop.train(model, EXAMPLES, TrainConfig(steps=1), tmp_path / "run", 1, say=lambda line: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES[1:], EXAMPLES[2:]], ids=["long", "two tokens", "all alike"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_causal_model_passes_whatever_it_is_shown(make, examples, dtype):
    refuse_reading_ahead(inject(make().to(dtype), lora("all-linear", task_type="CAUSAL_LM")), examples, 1)


def test_a_model_of_nan_is_left_to_the_first_step(tmp_path):
    model = inject(llama(), lora(["q_proj"]))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(StateError, match="no finite gradient"):
        loop.train(model, EXAMPLES[1:], TrainConfig(steps=1), tmp_path / "run", 1)
