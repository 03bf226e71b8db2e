"""Packed examples are learnt as they are apart: the same gradient wherever the model can, refused by name where it cannot."""

import math

import pytest
import torch

import minilora.training.loop as loop
from minilora import LoraConfig, inject
from minilora.data.batches import collate, micro_batches
from minilora.data.encoding import Encoded
from minilora.data.packing import collate_one_row, collate_packed, saving
from minilora.data.tokens import IGNORED
from minilora.errors import ConfigError, StateError
from minilora.training.losses import evaluate, token_losses
from minilora.training.packed import choose_collate, why_not_packed
from minilora.training.settings import TrainConfig
from tests.models import Words, lora

transformers = pytest.importorskip("transformers")

PAD, VOCABULARY = 1, 96
TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": PAD, "bos_token_id": 0,
        "eos_token_id": 2, "initializer_range": 0.1}  # fmt: skip
READS = {
    "llama": {}, "mistral": {"sliding_window": 8}, "qwen2": {}, "qwen3": {}, "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, "phi3": {},
    "olmo2": {}, "granite": {}, "cohere2": {"sliding_window": 8}, "gpt_neox": {}, "lfm2": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
LEAKS = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, "mamba": {"state_size": 8},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                   "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def example(length, asked, seed):
    tokens = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(tuple(tokens), tuple([IGNORED] * asked + tokens[asked:]))


EXAMPLES = [
    example(*each) for each in [(40, 3, 0), (9, 0, 1), (14, 8, 2), (7, 2, 3), (11, 1, 4), (23, 20, 5), (5, 1, 6)]
]


def model_of(kind, attention=None, **fields):
    """A tiny model with random numbers everywhere and an adapter on every linear layer, whose B is not zero.

    ``attention``: None for what the model takes by itself.
    """
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **(READS | LEAKS)[kind], **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = inject(model.eval(), lora("all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def step(model, batch):
    """The loss and the gradient of a step, as the loop takes them."""
    model.zero_grad()
    losses = token_losses(model, batch)
    losses.mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return losses.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])


def largest(values):
    return values.abs().max().item()


# ---- models that read packed examples


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("kind", READS)
def test_the_gradient_is_that_of_examples_apart(kind, attention):
    model = model_of(kind, attention)
    for packing in (collate_packed, collate_one_row):
        assert why_not_packed(model, EXAMPLES, PAD, packing) is None
    losses, gradient = step(model, collate_packed(EXAMPLES, PAD))
    wanted, right = step(model, collate(EXAMPLES, PAD))
    assert len(losses) == len(wanted) and right.norm() > 1e-3
    assert largest(losses.sort().values - wanted.sort().values) < 1e-4
    assert (gradient - right).norm() / right.norm() < 1e-6


@pytest.mark.parametrize("kind", LEAKS)
def test_a_model_that_does_not_is_refused_by_name(kind, tmp_path):
    model, said = model_of(kind), []
    with pytest.raises(
        StateError, match=rf"pack='on': {type(model).__name__} .*; leave pack at 'auto', or set it to 'off'"
    ) as caught:
        choose_collate(model, EXAMPLES, TrainConfig(pack="on"), PAD, said.append)
    assert "\n" not in str(caught.value)
    assert choose_collate(model, EXAMPLES, TrainConfig(batch_size=7), PAD, said.append) is collate
    (line,) = said
    assert line.startswith("examples are not packed, though 6") and type(model).__name__ in line


def test_a_row_longer_than_a_table_of_the_model_is_refused(tmp_path):
    """GPT-Neo has a mask of as many tokens as its context has, and a row of several examples may be longer."""
    model, said = model_of("gpt_neo", max_position_embeddings=48), []
    config = TrainConfig(batch_size=7)
    with pytest.raises(StateError, match=r"GPTNeoForCausalLM .*it fails: .*48"):
        choose_collate(model, EXAMPLES, TrainConfig(batch_size=7, pack="on"), PAD, said.append)
    assert choose_collate(model, EXAMPLES, config, PAD, said.append) is collate and len(said) == 1
    assert choose_collate(model, EXAMPLES[1:5], TrainConfig(4, 4, pack="on"), PAD, print) is collate_packed  # 41 tokens


def test_a_difference_in_long_rows_alone_is_found(monkeypatch):
    model, said = model_of("llama", max_position_embeddings=48), []
    call = model.model.forward

    def forward(input_ids=None, position_ids=None, **more):
        late = torch.arange(input_ids.shape[1]) >= 48  # longer than what is read first
        moved = None if position_ids is None else position_ids * (1 + late)
        return call(input_ids=input_ids, position_ids=moved, **more)

    monkeypatch.setattr(model.model, "forward", forward)
    assert why_not_packed(model, EXAMPLES, PAD, collate_packed) is None
    assert choose_collate(model, EXAMPLES, TrainConfig(batch_size=7), PAD, said.append) is collate
    assert "a loss differs by" in said[0]


def test_the_loop_refuses_before_anything_is_written(tmp_path):
    with pytest.raises(StateError, match="pack='on'"):
        loop.train(model_of("opt"), EXAMPLES, TrainConfig(pack="on", steps=1), tmp_path / "run", PAD)
    assert not (tmp_path / "run").exists()


def test_a_model_without_positions_is_refused():
    model = inject(Words(), LoraConfig(r=2, lora_alpha=5, target_modules=["mid"]))
    assert why_not_packed(model, EXAMPLES, PAD, collate_packed) == (
        "Words takes no position_ids, so it cannot tell where an example ends"
    )


def test_an_adapter_that_looks_for_tokens_is_refused():
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    inject(model, config, variant="alora")
    assert why_not_packed(model, EXAMPLES, PAD, collate_packed) == "the adapter looks for its tokens in a whole row"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", ["the last token of the example before", "positions that go on"])
def test_a_small_leak_is_found_in_every_dtype(monkeypatch, dtype, seen):
    model = model_of("llama").to(dtype)
    assert why_not_packed(model, EXAMPLES, PAD, collate_packed) is None
    call = model.model.forward

    def forward(input_ids=None, position_ids=None, attention_mask=None, **more):
        if seen.startswith("positions") and position_ids is not None:
            position_ids = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        out = call(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **more)
        if seen.startswith("the last"):
            out.last_hidden_state = out.last_hidden_state + 0.2 * out.last_hidden_state.roll(1, 1).tril()
        return out

    monkeypatch.setattr(model.model, "forward", forward)
    assert "does not read packed examples as it reads them apart" in why_not_packed(
        model, EXAMPLES, PAD, collate_packed
    )


def test_where_only_one_row_can_be_told_apart_all_examples_go_into_one(monkeypatch):
    """FlashAttention through transformers looks at positions in a batch of one row only."""
    model = model_of("llama")
    call = model.model.forward

    def forward(input_ids=None, position_ids=None, **more):
        several = position_ids is not None and len(input_ids) > 1
        return call(input_ids=input_ids, position_ids=None if several else position_ids, **more)

    monkeypatch.setattr(model.model, "forward", forward)
    assert choose_collate(model, EXAMPLES, TrainConfig(pack="on"), PAD, print) is collate_one_row


def test_the_look_leaves_the_model_as_it_was():
    model = model_of("qwen3").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert why_not_packed(model, EXAMPLES, PAD, collate_packed) is None
    assert modes == [module.training for module in model.modules()] and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- whether a run packs


def test_what_it_saves_is_said_and_where_it_saves_little_nothing_is_packed():
    model, said = model_of("llama"), []
    assert choose_collate(model, EXAMPLES, TrainConfig(batch_size=7), PAD, said.append) is collate_packed
    found = saving(EXAMPLES, 7, 0)
    assert found.packed < 0.02 and found.padding > 0.6
    assert said == [
        f"examples are packed: {found.packed:.1%} of the tokens computed are padding instead of {found.padding:.1%}, "
        f"{found.times:.2f} times fewer tokens in all (--pack off leaves each its row)"
    ]
    alike = [example(20 + number % 3, 2, number) for number in range(9)]
    assert choose_collate(model, alike, TrainConfig(), PAD, said.append) is collate and len(said) == 1
    assert choose_collate(model, alike, TrainConfig(pack="on"), PAD, said.append) is collate_packed
    assert choose_collate(model, EXAMPLES, TrainConfig(batch_size=7, pack="off"), PAD, said.append) is collate
    assert len(said) == 2


@pytest.mark.parametrize("value", ["yes", True, None, ""])
def test_another_word_is_refused(value):
    with pytest.raises(ConfigError, match=r"^pack=.*wanted one of auto, on, off"):
        TrainConfig(pack=value)


def run(folder, pack, **fields):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    torch.manual_seed(1)
    inject(model, lora("all-linear", task_type="CAUSAL_LM"))
    said, options = [], {"steps": 4, "batch_size": 3, "accumulate": 2, "lr": 0.01, "pack": pack}
    resume = fields.pop("resume", False)
    config = TrainConfig(**(options | fields))
    records = loop.train(model, EXAMPLES, config, folder, PAD, EXAMPLES[:3], resume=resume, say=said.append)
    return records, said


def test_a_packed_run_is_the_run_of_examples_apart(tmp_path):
    packed, apart = run(tmp_path / "on", "on")[0], run(tmp_path / "off", "off")[0]
    for one, other in zip(packed, apart, strict=True):
        assert one.get("tokens") == other.get("tokens")  # padding does not count
        for key in one.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_a_packed_run_goes_on_to_the_same_bits_and_says_when_it_is_packed_no_more(tmp_path):
    run(tmp_path / "whole", "on", save_every=2, keep_checkpoints=9)
    weights = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    for pack in ("on", "off"):
        folder = tmp_path / pack
        folder.mkdir()
        (tmp_path / "whole" / "checkpoint-2").rename(folder / "checkpoint-2")
        _, said = run(folder, pack, resume=True)
        assert ((folder / "adapter_model.safetensors").read_bytes() == weights) == (pack == "on")
        told = "packed is False, in the checkpoint True: the same run, but its last bits may differ"
        assert (told in said) == (pack == "off")
        (folder / "checkpoint-2").rename(tmp_path / "whole" / "checkpoint-2")


def test_an_evaluation_is_the_same_packed():
    model = model_of("llama")
    losses = [
        evaluate(model, EXAMPLES, 4, PAD, tensors=tensors) for tensors in (collate, collate_packed, collate_one_row)
    ]
    assert math.isfinite(losses[0]) and losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_step_sees_the_same_examples_packed_or_not(monkeypatch, tmp_path):
    seen, real = [], collate_packed
    monkeypatch.setattr(
        "minilora.training.packed.collate_packed", lambda batch, pad: seen.append(list(batch)) or real(batch, pad)
    )
    run(tmp_path, "on", steps=2, accumulate=1)
    batches = micro_batches(EXAMPLES, 3, 0)
    trained = [batch for batch in seen if batch != EXAMPLES[:3]]  # not the evaluation's
    assert trained[0] == next(batches) and trained[-1] == next(batches)
