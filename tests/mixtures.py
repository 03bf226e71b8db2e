"""Tiny mixtures of experts of transformers, and adapter folders as they were when each expert was three linear layers."""

import json

import torch
from safetensors.torch import save_file

from tests.models import finished

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
_SMALL |= {
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_FIELDS = {
    "qwen3_moe": {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 20, "num_experts_per_tok": 2},
    # a first dense layer, and a shared expert beside the others
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "intermediate_size": 24, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "intermediate_size": 24, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "head_dim": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "head_dim": 8, "moe_shared_expert_intermediate_size": 12, "n_group": 1, "topk_group": 1, "intermediate_size": 24,
    },
}  # fmt: skip


def mixture(kind="qwen3_moe", seed=0, **fields):
    """A causal language model of two layers with experts, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    small = dict(_SMALL)
    if kind == "nemotron_h":
        small.pop("num_hidden_layers")
    return finished(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**small, **_FIELDS[kind], **fields}))
    ).eval()


def experts_of(model):
    """Path and module of every experts module, as the plain model has them."""
    return {
        path: module
        for path, module in model.named_modules()
        if path.endswith("experts") and "down_proj" in module._parameters
    }


def old_folder(folder, layers, *, r=4, lora_alpha=6, seed=1, dtype=torch.float32, **fields):
    """Write an adapter of single layers, ``path -> (out, in)`` or ``(out, in, r)``, and return ``path -> (A, B)``."""
    generator = torch.Generator().manual_seed(seed)
    factors, tensors = {}, {}
    for path, (rows, columns, *rank) in layers.items():
        own = rank[0] if rank else r
        A, B = (torch.randn(shape, generator=generator).to(dtype) * 0.3 for shape in ((own, columns), (rows, own)))
        factors[path] = A, B
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": lora_alpha,
        "bias": "none",
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return factors


def expert_layers(model, names=("gate_proj", "up_proj", "down_proj"), rename=lambda path: path):
    """``path -> (out, in)`` of the layers that the experts of a model were, by the names of gate, up and down (None leaves one out)."""
    found = {}
    for path, module in experts_of(model).items():
        hidden, inner = module.down_proj.shape[1:]
        for expert in range(len(module.down_proj)):
            for name, shape in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
                if name is not None:
                    found[f"{rename(path)}.{expert}.{name}"] = shape
    return found


@torch.no_grad()
def add_by_hand(model, factors, scaling, names=("gate_proj", "up_proj", "down_proj"), rename=lambda path: path):
    """Add ``scaling(path) * B A`` of single layers to the weights of a plain model: experts to their parts of the joined weights."""
    homes = {rename(path): module for path, module in experts_of(model).items()}
    for path, (A, B) in factors.items():
        update = scaling(path) * (B.double() @ A.double())
        home, _, end = path.rpartition(".")
        home, _, expert = home.rpartition(".")
        if home not in homes:
            model.get_submodule(path).weight.add_(update)
            continue
        experts, inner = homes[home], homes[home].down_proj.shape[2]
        if end == names[2]:
            experts.down_proj[int(expert)].add_(update)
        elif hasattr(experts, "gate_up_proj"):
            rows = slice(0, inner) if end == names[0] else slice(inner, None)
            experts.gate_up_proj[int(expert), rows].add_(update)
        else:
            experts.up_proj[int(expert)].add_(update)
    return model
