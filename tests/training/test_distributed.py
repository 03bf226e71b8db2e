"""Two processes train what one process trains: DDP, and FSDP2 with its shards, on a model with packed layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZE, STEPS = 2, 3


def model_and_data(kind="dense"):
    import transformers

    import minilora

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    if "experts" in kind:
        config = transformers.Qwen3MoeConfig(
            vocab_size=96, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if kind != "dense experts":
        minilora.quantize_model(model, minilora.QuantConfig(double_quant=True))
    minilora.get_peft_model(model, minilora.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train(), torch.randint(96, (STEPS, SIZE, 11))


def train(model, batches):
    """The loss of each step over this process's rows."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9, foreach=False)
    losses = []
    for rows in batches:
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model):
    """Every trained tensor and a packed one, gathered from its shards."""
    named = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    kept = {n: t for n, t in named.items() if "lora_" in n or n.endswith("q_proj.base_layer.weight")}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in kept.items()}


def worker(rank, way, folder, kind):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=SIZE, init_method=f"file://{folder}/meet")
    model, data = model_and_data(kind)
    if way == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (SIZE,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mlp = model.model.layers[0].mlp
        packed = (mlp.experts.gate_up_proj if "experts" in kind else mlp.up_proj).base_layer.weight
        assert packed.to_local().shape[0] * SIZE == packed.shape[0]  # the codes are sharded, not copied
        assert (packed.dtype == torch.uint8) == (kind != "dense experts") and not packed.requires_grad
    losses = train(model, [rows[rank : rank + 1] for rows in data])
    tensors = whole(model)
    torch.save({"losses": losses, "tensors": tensors}, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


@pytest.mark.parametrize("kind", ["dense", "experts", "dense experts"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_equal_one(way, kind, tmp_path):
    setting = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), way, str(tmp_path), kind], env=setting, stderr=subprocess.PIPE
        )
        for rank in range(SIZE)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-2000:]

    model, data = model_and_data(kind)
    wanted_losses, wanted = train(model, data), whole(model)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]
    for step, loss in enumerate(wanted_losses):
        assert sum(part["losses"][step] for part in parts) / SIZE == pytest.approx(loss, abs=1e-6)
    start = whole(model_and_data(kind)[0])
    for name, tensor in wanted.items():
        for part in parts:
            torch.testing.assert_close(part["tensors"][name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(tensor, start[name]) == ("lora_" not in name)  # adapters moved, codes did not


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
