"""Compiled steps, activations in the CPU's memory, and the share of a GPU's peak: what each does, and that it changes no result."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import minilora.training.flops as flops
import minilora.training.loop as loop
import minilora.training.offload as offload
from minilora import QuantConfig, inject, quantize_model
from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, StateError
from minilora.training.compiling import as_written, compiled
from minilora.training.losses import token_losses
from minilora.training.settings import TrainConfig
from tests.models import llama, lora, moe, randomize

TARGETS = ["q_proj", "v_proj", "down_proj"]
EXAMPLES = [Encoded(tuple(range(3, 3 + size)), tuple(range(3, 3 + size))) for size in (9, 6, 12, 7)]


def adapted(dropout=0.0, quant=False, **fields):
    model = llama(**fields)
    if quant:
        quantize_model(model, QuantConfig("nf4", double_quant=True))
    return randomize(inject(model, lora(TARGETS, lora_dropout=dropout)))


def run(folder, model, steps=3, resume=False, **settings):
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": steps, "batch_size": 2, "save_every": 2, "eval_every": 2, **settings})
    return loop.train(model, EXAMPLES, config, folder, 0, EXAMPLES[:1], resume=resume, say=lambda line: None)


def losses(records):
    return [record["loss"] for record in records if "loss" in record]


# ---- compile


@pytest.fixture
def calls(monkeypatch):
    """A compiler that counts the calls of what it compiled, and whether gradients were wanted."""
    seen = []

    def compile_in_place(self, *args, **kwargs):
        def call(*args, **kwargs):
            seen.append(torch.is_grad_enabled())
            return self._call_impl(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return seen


def test_the_steps_call_what_was_compiled_and_nothing_else_does(calls, tmp_path):
    model = adapted()
    plain = run(tmp_path / "plain", adapted())
    assert not calls
    found = run(tmp_path / "compiled", model, compile=True)
    assert calls == [True] * 3 * len(model.model.layers)  # neither the evaluations nor the first look at the adapter
    assert losses(found) == losses(plain)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_look_from_outside_sees_the_model_as_it_is_written(calls):
    model = adapted()
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}
    with compiled(model, True):
        with as_written(model):
            token_losses(model, batch)
        assert not calls
        token_losses(model, batch)
    assert len(calls) == len(model.model.layers)


@pytest.mark.parametrize("why", ["no compiler is here", ""])
def test_a_machine_that_cannot_compile_is_refused_before_anything_is_written(monkeypatch, tmp_path, why):
    def fails(function):
        raise RuntimeError(why)

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(
        StateError, match=f"torch cannot compile for cpu here \\({why or 'RuntimeError'}\\); leave --compile out"
    ):
        run(tmp_path / "run", adapted(), compile=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_gone_on_with_is_compiled_as_it_was(calls, tmp_path):
    from minilora.errors import CheckpointError

    run(tmp_path, adapted(), steps=2, compile=True)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="compile"):
        run(tmp_path, adapted(), steps=2, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_steps_are_the_steps_of_the_model_as_it_is_written(tmp_path, checkpointing):
    settings = {"gradient_checkpointing": checkpointing, "lr": 1e-4}
    plain = run(tmp_path / "plain", adapted(quant=True), **settings)
    found = run(tmp_path / "compiled", adapted(quant=True), compile=True, **settings)
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.slow
def test_a_compiled_run_with_dropout_goes_on_to_the_same_bits(tmp_path):
    def saved(folder):
        return (folder / "adapter_model.safetensors").read_bytes()

    run(tmp_path / "whole", adapted(0.3), steps=4, compile=True)

    def breaks(record):
        if record["step"] == 3:
            raise ValueError("the watcher")

    config = TrainConfig(steps=4, batch_size=2, save_every=2, eval_every=2, compile=True)
    with pytest.raises(ValueError, match="the watcher"):
        loop.train(adapted(0.3), EXAMPLES, config, tmp_path / "parts", 0, EXAMPLES[:1], watch=breaks)
    run(tmp_path / "parts", adapted(0.3), steps=4, compile=True, resume=True)
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")


# ---- offload


def test_offloading_wants_a_gpu_and_gradient_checkpointing(tmp_path):
    with pytest.raises(ConfigError, match="set that as well"):
        TrainConfig(offload="activations")
    with pytest.raises(
        ConfigError, match="the model is on cpu, whose memory they would go to; wanted a GPU, or offload='none'"
    ):
        run(tmp_path / "run", adapted(), offload="activations", gradient_checkpointing=True)
    assert not (tmp_path / "run").exists()


def test_the_input_of_each_block_is_what_moves_and_it_comes_back_the_same(monkeypatch, tmp_path):
    """On a CPU that is taken for a GPU: the moves are copies."""
    plain = run(tmp_path / "plain", adapted(), gradient_checkpointing=True)
    moved, hooks = [], torch.autograd.graph.saved_tensors_hooks

    def watched(pack, unpack):
        def noted(tensor):
            packed = pack(tensor)
            if packed[1] is not tensor:
                moved.append(tuple(tensor.shape))
            return packed

        return hooks(noted, unpack)

    monkeypatch.setattr(offload, "_is_away", lambda device: True)
    monkeypatch.setattr(offload, "_LEAST", 1)
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    model = adapted()
    config = model.config
    found = run(tmp_path / "moved", model, gradient_checkpointing=True, offload="activations")
    assert losses(found) == losses(plain)
    inputs = [shape for shape in moved if shape[-1] == config.hidden_size and len(shape) == 3]
    assert len(inputs) >= 3 * config.num_hidden_layers
    weights = {tuple(parameter.shape) for parameter in model.parameters()}
    assert not weights & set(moved)


# ---- the share of the peak


def test_the_operations_of_a_step_are_those_that_torch_counts():
    model = adapted()
    model.enable_input_require_grads()  # or the first block's inputs would want no gradient
    ids = torch.arange(3, 23).view(2, 10)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        count for name, count in counts.items() if "scaled_dot" not in str(name) and "attention" not in str(name)
    )
    body, head = flops.flops_a_token(model)
    rotary = 2 * 2 * 5 * 10  # positions, by a product in transformers
    assert abs((body + head) * ids.numel() - products) <= 10 * rotary


def test_the_operations_of_a_mixture_are_those_of_the_experts_that_a_token_takes():
    model = moe(hidden_size=48, moe_intermediate_size=40)
    inject(model, lora("all-linear"))
    ids = torch.arange(20).view(2, 10)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        count for name, count in counts.items() if "attention" not in str(name) and "scaled_dot" not in str(name)
    )
    body, head = flops.flops_a_token(model)
    assert abs((body + head) * ids.numel() / products - 1) < 0.05  # the routers and the rotary angles are left out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA T400", None),
    ],
)
def test_the_peak_is_that_of_the_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops(torch.device("cuda", 0)) == peak
    assert flops.peak_flops(torch.device("cpu")) is None


def test_a_step_says_its_share_where_the_peak_is_known(monkeypatch, tmp_path, capsys):
    from minilora.training.progress import Progress

    assert all("share_of_peak" not in record for record in run(tmp_path / "cpu", adapted()))
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e9)
    records = [record for record in run(tmp_path / "known", adapted()) if "loss" in record]
    body, head = flops.flops_a_token(adapted())
    for record in records:
        spent = record["tokens"] / record["tokens_per_s"]
        assert (
            body * record["tokens"] / spent / 1e9
            < record["share_of_peak"]
            < (body + head) * record["tokens"] / spent / 1e9
        )
    assert json.loads((tmp_path / "known" / "log.jsonl").read_text().splitlines()[1])["share_of_peak"] > 0
    with Progress(3) as progress:
        progress.watch(records[0] | {"share_of_peak": 0.413})
    assert "41% of the GPU's peak" in capsys.readouterr().out
