"""The loss of each token: what plain torch says of the same logits, token by token, whether a token counts or not."""

import pytest
import torch
import torch.nn.functional as F

from minilora import inject
from minilora.data.encoding import IGNORED, Encoded
from minilora.lora.slots import adapters_of
from minilora.training.losses import losses_by_token
from tests.models import Words, lora, randomize

IDS = [(3, 17, 4, 9, 30, 2, 2), (5, 1, 40), (8,)]
EXAMPLES = [Encoded(ids, tuple([IGNORED] * (len(ids) - 1) + [ids[-1]])) for ids in IDS]


def twin(model, ids):
    """Plain torch: the logits of all but the last token against the token behind each."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, :-1]
    return F.cross_entropy(logits.double(), tokens[0, 1:], reduction="none").tolist()


def check(model):
    found = losses_by_token(model, EXAMPLES, 0)
    assert [len(losses) for losses in found] == [7, 3, 1]
    for losses, ids in zip(found, IDS, strict=True):
        assert losses[0] is None
        assert losses[1:] == pytest.approx(twin(model, ids), rel=1e-5)
    return found


def test_they_are_those_of_plain_torch_without_and_with_an_adapter():
    model = randomize(inject(Words().eval(), lora(["mid"])))
    after = check(model)
    with adapters_of(model).bare():
        before = check(model)
    assert before[0][1:] != pytest.approx(after[0][1:], rel=1e-2)
    assert before == losses_by_token(Words().eval(), EXAMPLES, 0)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_of_transformers_and_its_mode(make_llama, training):
    model = make_llama()
    check(model)
    drops = randomize(inject(model, lora(["q_proj", "down_proj"], lora_dropout=0.5))).train(training)
    state = torch.random.get_rng_state()
    found = losses_by_token(drops, EXAMPLES, 0)
    assert drops.training is training and torch.equal(state, torch.random.get_rng_state())
    assert found == losses_by_token(drops.eval(), EXAMPLES, 0)
    assert all(parameter.grad is None for parameter in drops.parameters())
