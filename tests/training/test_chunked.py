"""The loss without logits: what the chunks give is what all logits give, and a head that cannot become the loss is told by name."""

import copy

import pytest
import torch
from torch import nn

import minilora
import minilora.training.chunked as chunked
from minilora import LoraConfig, inject
from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.linear.layers import in_front
from minilora.measure.ledger import Ledger
from minilora.training.chunked import head_losses, reference
from minilora.training.head import NO_HEAD, why_all_logits
from minilora.training.losses import evaluate, token_losses
from tests.models import Words, gpt2, lora

PAD = 63
BATCH = collate(
    [
        Encoded((4, 5, 6, 7, 8, 9, 3), (IGNORED, IGNORED, 6, 7, IGNORED, 9, 3)),
        Encoded((9, 3, 2, 11), (IGNORED, IGNORED, 2, 11)),
    ],
    PAD,
)


def head_of(vocabulary, width, dtype=torch.float32, bias=True):
    torch.manual_seed(3)
    head = nn.Linear(width, vocabulary, bias=bias).requires_grad_(False)
    if bias:
        head.bias.normal_(std=0.5)
    in_front([head.to(dtype)])
    return head


def gradients(loss, hidden, targets, head, shares):
    hidden = hidden.clone().requires_grad_()
    losses = loss(hidden, targets, head)
    (losses * shares).sum().backward()
    return losses.detach(), hidden.grad


def all_logits(model, batch, monkeypatch):
    """``token_losses`` and the gradients of what trains, with and without the logits."""
    found = []
    for why in (None, "asked for"):
        with monkeypatch.context() as patch:
            if why:
                patch.setattr("minilora.training.losses.why_all_logits", lambda model, why=why: why)
            model.zero_grad()
            losses = token_losses(model, batch)
            (losses * torch.linspace(0.2, 1, len(losses))).sum().backward()
            found.append((losses.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 65])
@pytest.mark.parametrize("room", [1, 4 * 37 * 5, 4 * 37 * 33, 96_000_000], ids=["one", "five", "32", "all"])
def test_the_chunks_give_the_losses_and_gradients_of_all_logits(monkeypatch, tokens, room, bias):
    monkeypatch.setattr(chunked, "_ROOM", room)
    head, draw = head_of(37, 10, bias=bias), torch.Generator().manual_seed(tokens)
    hidden, targets = torch.randn(tokens, 10, generator=draw) * 3, torch.randint(0, 37, (tokens,), generator=draw)
    shares = torch.randn(tokens, generator=draw)  # every token weighs something else
    losses, gradient = gradients(head_losses, hidden, targets, head, shares)
    wanted, right = gradients(reference, hidden, targets, head, shares)
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)
    assert losses.dtype == torch.float32 and head.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_losses_are_fp32_and_the_same(monkeypatch, dtype):
    monkeypatch.setattr(chunked, "_ROOM", 6 * 37 * 5)
    head, draw = head_of(37, 10, dtype), torch.Generator().manual_seed(1)
    hidden, targets = torch.randn(13, 10, generator=draw).to(dtype), torch.randint(0, 37, (13,), generator=draw)
    losses, gradient = gradients(head_losses, hidden, targets, head, torch.ones(13))
    wanted, right = gradients(reference, hidden, targets, head, torch.ones(13))
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, right, rtol=2e-2, atol=2e-2)


def test_large_logits_do_not_overflow():
    head = head_of(5, 4)
    hidden = torch.full((2, 4), 1e4)
    torch.testing.assert_close(
        head_losses(hidden, torch.tensor([0, 3]), head), reference(hidden, torch.tensor([0, 3]), head)
    )


def test_all_logits_are_never_there(monkeypatch):
    monkeypatch.setattr(chunked, "_ROOM", 4 * 301 * 32)
    head, hidden = head_of(301, 6), torch.randn(999, 6, requires_grad=True)
    made = {}
    for loss in (head_losses, reference):
        with Ledger() as ledger:
            loss(hidden, torch.zeros(999, dtype=torch.long), head).sum().backward()
        made[loss] = sum(ledger.peak()[1].values())
    given, small = 999 * (8 + 6 * 4) + 301 * 7 * 4, 999 * (6 + 6 + 4) * 4  # gradients of hidden, losses
    assert 4 * 301 * 32 < made[head_losses] < 4 * 301 * 32 + given + small < 2 * 4 * 301 * 999 < made[reference]


# ---- which heads


@pytest.mark.parametrize("keeps", [True, False], ids=["logits_to_keep", "all positions"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_the_same_losses_and_gradients_without_its_logits(monkeypatch, randomize, tied, keeps):
    monkeypatch.setattr(chunked, "_ROOM", 4 * 64 * 2)
    model = randomize(inject(gpt2(tie_word_embeddings=tied), lora(["c_attn", "c_fc"], task_type="CAUSAL_LM")))
    if not keeps:
        call = type(model).forward
        model.forward = lambda input_ids, attention_mask: call(model, input_ids, attention_mask=attention_mask)
    assert why_all_logits(model) is None
    (losses, own), (wanted, right) = all_logits(model, BATCH, monkeypatch)
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)
    assert any(gradient.any() for gradient in own) and "forward" not in vars(model.lm_head)


def test_the_loss_of_an_evaluation_has_no_logits_either(monkeypatch, make_llama):
    model, called = inject(make_llama(), lora("all-linear")), []
    monkeypatch.setattr("minilora.training.head.head_losses", lambda *a: called.append(1) or head_losses(*a))
    evaluate(model, [Encoded((4, 5, 6), (IGNORED, 5, 6))], 1, PAD)
    assert called == [1]


def test_a_head_that_fails_is_put_back(monkeypatch, make_llama):
    model = inject(make_llama(), lora("all-linear"))
    assert why_all_logits(model) is None

    def fails(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr("minilora.training.head.head_losses", fails)
    with pytest.raises(RuntimeError, match="no"):
        token_losses(model, BATCH)
    assert "forward" not in vars(model.lm_head)


def capped(make_llama):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                       num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).eval()


def scaled(make_llama):
    transformers = pytest.importorskip("transformers")
    config = transformers.GraniteConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, logits_scaling=3.0)  # fmt: skip
    torch.manual_seed(0)
    return transformers.GraniteForCausalLM(config).eval()


def cut(make_llama):
    """A model whose own forward leaves out a part of the vocabulary."""
    model = make_llama()
    call = model.forward

    def forward(input_ids, attention_mask, logits_to_keep=0):
        out = call(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)
        out.logits = out.logits[..., :60]
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("make", [capped, scaled, cut])
def test_logits_that_are_changed_after_the_head_are_computed(monkeypatch, make_llama, randomize, make):
    model = randomize(inject(make(make_llama), lora(["q_proj", "down_proj"])))
    assert why_all_logits(model) == "what its head returns is changed after it, or not used"
    monkeypatch.setattr("minilora.training.head.head_losses", None)  # is not called
    batch = collate([Encoded((4, 5, 6, 7), (IGNORED, 5, 6, 7))], PAD)
    wanted = chunked.cross_entropy(
        model(batch["input_ids"], batch["attention_mask"]).logits[0, :-1], torch.tensor([5, 6, 7])
    )
    torch.testing.assert_close(token_losses(model, batch), wanted)


def test_a_head_that_trains_or_is_packed_or_adapted_or_watched_is_left_as_it_is(make_llama):
    adapted = inject(make_llama(), lora(["q_proj", "lm_head"]))
    assert why_all_logits(adapted) == "its head is a LoRALinear, and no plain linear layer"
    copied = inject(make_llama(), lora(["q_proj"], modules_to_save=["lm_head"]))
    assert why_all_logits(copied) == "its head trains"
    packed = make_llama()
    packed.lm_head = minilora.QuantLinear.from_linear(packed.lm_head, minilora.QuantConfig())
    assert why_all_logits(packed) == "its head is a QuantLinear, and no plain linear layer"
    watched = make_llama().requires_grad_(False)
    assert why_all_logits(watched) is None
    hook = watched.lm_head.register_forward_hook(lambda *_: None)
    assert why_all_logits(watched) == "its head has hooks, which look for logits"
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert why_all_logits(watched) == "autocast chooses the dtype of its head"
    assert why_all_logits(Words()) == NO_HEAD


def test_a_head_that_is_exchanged_is_asked_anew(make_llama):
    model = make_llama().requires_grad_(False)
    assert why_all_logits(model) is None
    minilora.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["lm_head"]))
    assert "LoRALinear" in why_all_logits(model)
    assert why_all_logits(copy.deepcopy(model)) == why_all_logits(model)


def test_the_question_draws_nothing_and_leaves_no_gradient(make_llama):
    model = inject(make_llama(), lora("all-linear", lora_dropout=0.5)).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert why_all_logits(model) is None
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())


def test_a_run_says_why_it_computes_all_logits(make_llama, tmp_path):
    from minilora.training.loop import TrainConfig, train

    said = []
    model = inject(scaled(make_llama), lora(["q_proj", "down_proj"]))
    train(model, [Encoded((4, 5, 6), (IGNORED, 5, 6))], TrainConfig(steps=1), tmp_path, PAD, say=said.append)
    assert (
        "the loss computes all logits of a micro-batch: what its head returns is changed after it, or not used" in said
    )
