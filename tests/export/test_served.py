"""A GGUF LoRA is written for the file of the adapter's own base alone, in whatever blocks that file has its weights."""

import json
import shutil

import pytest
import torch

from minilora import LoraConfig, inject, load_adapter, save_adapter
from minilora.cli import main
from minilora.errors import CheckpointError
from minilora.export.llama_cpp import export_gguf
from minilora.export.ollama import export_ollama
from minilora.gguf.file import open_gguf
from minilora.gguf.rewrite import _copied, encoded
from minilora.gguf.write import fill_gguf
from minilora.hf.gguf_merge import fill_model
from minilora.quant.gguf.formats import FORMATS
from minilora.store.adapter_files import SEAL_FILE
from tests import ggml
from tests.gguf import tiny
from tests.models import randomize

pytest.importorskip("gguf")
WIDE = {"hidden_size": 256, "intermediate_size": 512}  # whole blocks of 256
# Each changes what it writes otherwise: rows of queries and keys, norms, q with k and v, experts in halves, and none of these.
MODELS = {
    "llama": WIDE | {"head_dim": 64},
    "gemma2": WIDE,
    "gpt_neox": WIDE,
    "qwen3_moe": WIDE | {"moe_intermediate_size": 256},
    "gpt2": {"n_embd": 256},
}
KINDS = ("F32", "F16", "BF16", *FORMATS)


def written(path, kind="F32", model="llama", seed=0, dtype=torch.float32, **fields):
    """The GGUF file of a model that was in ``dtype`` before, with its matrices in ``kind``."""
    import gguf

    made = tiny.model(model, seed, **MODELS[model], **fields).to(dtype).float()
    fill_model(made, tiny.tokenizer(), path.with_suffix(".f32"), "f32")
    with open_gguf(path.with_suffix(".f32")) as file:

        def plan(info):
            values = file.values(info.name)
            chosen = kind if values.dim() > 1 and values.shape[-1] % 256 == 0 else "F32"
            if chosen in FORMATS:
                pytest.importorskip("xllamacpp")
                blocks = ggml.quantized(values, chosen)
                return info.name, info.shape, chosen, lambda: blocks.view(*info.shape[:-1], -1)
            if chosen == "BF16":
                raw = torch.from_numpy(gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.BF16))
                return info.name, info.shape, chosen, lambda: raw
            return info.name, info.shape, chosen, lambda: encoded(info.name, values, chosen)

        fill_gguf(path, file.architecture, _copied(file, None), [plan(info) for info in file.tensors.values()])
    return path


def adapted(folder, model="llama", seed=0, dtype=torch.float32, base=None, **fields):
    """An adapter folder that looks trained, on the model of ``written`` or on ``base``."""
    made = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | fields
    if model == "qwen3_moe":
        made |= {"exclude_modules": ["gate"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    whole = inject(base or tiny.model(model, seed, **MODELS[model]).to(dtype), LoraConfig(**made))
    save_adapter(randomize(whole, seed=1), folder)
    return folder


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param(model, kind, marks=() if model == "llama" or kind == "Q4_K" else pytest.mark.slow)
        for model in MODELS
        for kind in KINDS
    ],
)
def test_the_own_base_passes_in_any_blocks_and_another_is_refused(model, kind, tmp_path):
    folder = adapted(tmp_path / "adapter", model)
    export_gguf(folder, written(tmp_path / "own.gguf", kind, model), tmp_path / "own-lora.gguf")
    other, out = written(tmp_path / "other.gguf", kind, model, seed=1), tmp_path / "no.gguf"
    with pytest.raises(
        CheckpointError, match=r"was trained on another base model than .*other\.gguf: .* holds .* remembers"
    ):
        export_gguf(folder, other, out)
    assert not out.exists()
    export_gguf(folder, other, out, allow_other_base=True)
    assert out.read_bytes() == (tmp_path / "own-lora.gguf").read_bytes(), "shapes and names are all that counts then"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
def test_rounding_before_and_after_the_training_is_no_other_base(dtype, kind, tmp_path):
    """The file was made of fp32 weights, or of those that the adapter was trained on in another type."""
    rounded = adapted(tmp_path / "rounded", dtype=dtype)
    export_gguf(rounded, written(tmp_path / "full.gguf", kind), tmp_path / "lora.gguf")
    export_gguf(rounded, written(tmp_path / "half.gguf", kind, dtype=dtype), tmp_path / "lora.gguf")


def test_queries_whose_rows_are_not_turned_are_another_base(tmp_path):
    """What a file of the right weights in the wrong order would hold."""
    folder = adapted(tmp_path / "adapter")
    turned = tiny.model("llama", **MODELS["llama"])
    for layer in turned.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.q_proj.weight.flip(0))
    fill_model(turned, tiny.tokenizer(), tmp_path / "turned.gguf", "q8_0")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds .*, in Q8_0, where"):
        export_gguf(folder, tmp_path / "turned.gguf", tmp_path / "no.gguf")


def test_a_fine_tuned_relative_is_seen_where_the_file_has_numbers(tmp_path):
    folder = adapted(tmp_path / "adapter", dtype=torch.bfloat16)
    relative = tiny.model("llama", **MODELS["llama"])
    with torch.no_grad():
        for parameter in relative.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape))
    fill_model(relative, tiny.tokenizer(), tmp_path / "relative.gguf", "f16")
    with pytest.raises(CheckpointError, match="another base model"):
        export_gguf(folder, tmp_path / "relative.gguf", tmp_path / "no.gguf")


def test_an_adapter_of_packed_weights_is_for_every_packing_of_its_base(tmp_path):
    from minilora import QuantConfig, quantize_model

    packed = quantize_model(tiny.model("llama", **MODELS["llama"]), QuantConfig("nf4"))
    folder = adapted(tmp_path / "adapter", base=packed)
    for kind in ("F16", "Q8_0", "Q4_0"):
        export_gguf(folder, written(tmp_path / f"{kind}.gguf", kind), tmp_path / "lora.gguf")
    with pytest.raises(CheckpointError, match="another base model"):
        export_gguf(folder, written(tmp_path / "other.gguf", "Q8_0", seed=1), tmp_path / "no.gguf")


def test_trained_on_the_served_file_itself(tmp_path):
    from minilora.hf import load_model

    served = written(tmp_path / "served.gguf", "Q4_0")
    folder = adapted(tmp_path / "adapter", base=load_model(str(served)))
    export_gguf(folder, served, tmp_path / "lora.gguf")
    export_gguf(folder, written(tmp_path / "finer.gguf", "Q8_0"), tmp_path / "lora.gguf")
    with pytest.raises(CheckpointError, match="another base model"):
        export_gguf(folder, written(tmp_path / "other.gguf", "Q4_0", seed=1), tmp_path / "no.gguf")


def test_experts_of_a_gguf_file_are_for_every_packing_of_it(tmp_path):
    """They become dense as they are read, and their numbers are those of their blocks."""
    from minilora.hf import load_model

    model = load_model(str(written(tmp_path / "trained.gguf", "Q4_0", "qwen3_moe")))
    folder = adapted(tmp_path / "adapter", "qwen3_moe", base=model)
    for kind in ("F32", "Q4_0", "Q8_0"):
        served, other = (written(tmp_path / f"{seed}.gguf", kind, "qwen3_moe", seed) for seed in (0, 1))
        for adapter in (folder, model):
            export_gguf(adapter, served, tmp_path / "lora.gguf")
            with pytest.raises(CheckpointError, match="another base model"):
                export_gguf(adapter, other, tmp_path / "no.gguf")


def test_a_model_in_memory_is_compared_as_a_folder_is(tmp_path):
    model = tiny.model("llama", **MODELS["llama"])
    load_adapter(model, adapted(tmp_path / "adapter"))
    export_gguf(model, written(tmp_path / "own.gguf", "Q8_0"), tmp_path / "lora.gguf")
    with pytest.raises(CheckpointError, match="the model: was trained on another base model"):
        export_gguf(model, written(tmp_path / "other.gguf", "Q8_0", seed=1), tmp_path / "no.gguf")


@pytest.mark.parametrize("sealed", [True, False])
def test_another_model_type_of_the_same_shapes_is_named(sealed, tmp_path):
    folder = adapted(tmp_path / "adapter")
    if not sealed:
        (folder / SEAL_FILE).unlink()
    served = tmp_path / "qwen.gguf"
    fill_model(tiny.model("qwen2", **MODELS["llama"], tie_word_embeddings=False), tiny.tokenizer(), served, "f32")
    with pytest.raises(
        CheckpointError, match=r"was trained on a model of type llama, and .*qwen\.gguf holds one of qwen2; give"
    ):
        export_gguf(folder, served, tmp_path / "no.gguf")


@pytest.mark.parametrize("where", ["auto_mapping", "config.json", "nowhere"])
def test_a_folder_that_remembers_no_base_says_so(where, tmp_path):
    """As PEFT writes them; the model type is then all that there is to compare."""
    folder = adapted(tmp_path / "adapter")
    (folder / SEAL_FILE).unlink()
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    if where != "auto_mapping":
        content["auto_mapping"] = None
    if where == "config.json":
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen2"}')
        content["base_model_name_or_path"] = str(tmp_path / "base")
    path.write_text(json.dumps(content))
    served = written(tmp_path / "served.gguf", "Q8_0", seed=1)
    if where == "config.json":
        with pytest.raises(CheckpointError, match="trained on a model of type qwen2"):
            export_gguf(folder, served, tmp_path / "lora.gguf")
        return
    with pytest.warns(UserWarning, match=r"does not remember the weights of its base, so of .*served\.gguf only names"):
        export_gguf(folder, served, tmp_path / "lora.gguf")
    export_gguf(folder, served, tmp_path / "allowed.gguf", allow_other_base=True)


def test_loftq_makes_up_for_its_own_codes_alone(tmp_path):
    made = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    folder = adapted(tmp_path / "adapter", **made)
    with pytest.raises(CheckpointError, match="the adapter makes up for the error of its own codes"):
        export_gguf(folder, written(tmp_path / "served.gguf", "Q8_0"), tmp_path / "no.gguf")


def test_the_commands_refuse_and_allow(tmp_path, capsys):
    folder, other = adapted(tmp_path / "adapter"), written(tmp_path / "other.gguf", "Q8_0", seed=1)
    for target, out in (("llama.cpp", tmp_path / "x.gguf"), ("ollama", tmp_path / "x")):
        arguments = ["export", "--adapter", str(folder), "--for", target, "--base", str(other), "--out", str(out)]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "--allow-other-base" in said and len(said.strip().splitlines()) == 1 and not out.exists()
        assert main([*arguments, "--allow-other-base"]) == 0 and out.exists()
    with pytest.raises(CheckpointError, match="another base"):
        export_ollama(folder, other, tmp_path / "y", lambda *_: "")
    assert not (tmp_path / "y").exists()


def test_the_command_says_that_nothing_is_remembered(tmp_path, capsys):
    folder, served = adapted(tmp_path / "adapter"), written(tmp_path / "served.gguf", "Q8_0")
    shutil.copytree(folder, tmp_path / "peft", ignore=lambda *_: {SEAL_FILE})
    arguments = ["export", "--for", "llama.cpp", "--base", str(served)]
    assert main([*arguments, "--adapter", str(folder), "--out", str(tmp_path / "a.gguf")]) == 0
    assert "remember" not in capsys.readouterr().err
    with pytest.warns(UserWarning, match="does not remember the weights of its base"):
        assert main([*arguments, "--adapter", str(tmp_path / "peft"), "--out", str(tmp_path / "b.gguf")]) == 0
