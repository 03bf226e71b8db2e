"""GGUF LoRA and merged GGUF files: what is in them is the adapter's own update, and llama.cpp computes what minilora computes."""

import json
import shutil

import pytest
import torch

from minilora import LoraConfig, get_peft_model, inject, save_adapter
from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.export.folders import export_adapter, export_folder
from minilora.export.llama_cpp import export_gguf
from minilora.gguf.file import open_gguf
from minilora.gguf.names import TESTED
from minilora.hf.gguf_merge import fill_model
from minilora.hf.merge import merge_to_gguf
from tests.gguf import tiny
from tests.llama_cpp import distance, post, serving
from tests.models import randomize

pytest.importorskip("gguf")
IDS = [5, 77, 200, 31, 9, 120, 66]
QUICK = ("llama", "gpt2", "gpt_neox", "falcon", "gemma2", "qwen3_moe")
MODEL_TYPES = sorted({kind for known in TESTED.values() for kind in known.model_types})
every_model = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in MODEL_TYPES]
)
# ggml's GELU is a table in fp16 and Gemma's activation too: their base is off by as much without an adapter.
ROUGH = {"gpt2", "gpt_neox", "falcon", "gemma", "gemma2", "gemma3_text", "phi", "starcoder2"}


def config(kind, **fields):
    """Every linear layer but those of routers, at a scale that a rank alone does not give."""
    out = {"exclude_modules": ["gate", "experts"]} if kind in ("qwen2_moe", "qwen3_moe", "olmoe") else {}
    plain = {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}
    return LoraConfig(**{**plain, **out, **fields})


def base_file(kind, folder, dtype="f32", **fields):
    """The GGUF file of a tiny model; the model is the one of ``tiny.model(kind, **fields)``."""
    path = folder / f"{kind}.gguf"
    fill_model(tiny.model(kind, **fields), tiny.tokenizer(), path, dtype)
    return path


def adapted(kind, folder, made=None, **fields):
    """The model with an adapter that looks trained, and the adapter's folder."""
    model = inject(tiny.model(kind, **fields), made or config(kind))
    randomize(model, seed=1)
    save_adapter(model, folder / "adapter")
    return model, folder / "adapter"


def updates_in(path):
    """Names of tensors to ``B A`` as llama.cpp forms it, where its scale is 1."""
    with open_gguf(path) as file:
        assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.type"] == "lora"
        assert file.metadata["adapter.lora.alpha"] == 0.0, "any other is divided by the rank of each tensor"
        halves = {name: file.values(name) for name in file.tensors}
    found = {}
    for name in {name.rpartition(".lora_")[0] for name in halves}:
        A, B = halves[f"{name}.lora_a"], halves[f"{name}.lora_b"]
        found[name] = A @ B.T if name.startswith("token_embd") else B @ A
    return found


def merged_file(model, folder):
    """The GGUF file of the model with its adapter merged."""
    from minilora import unload
    from minilora.many.merging import merge

    merge(model)
    unload(model, keep_merged=True)
    fill_model(model, tiny.tokenizer(), folder / "merged.gguf", "f32")
    return folder / "merged.gguf"


@pytest.mark.filterwarnings("ignore:PEFT 0.21 does not load:UserWarning")  # of shared experts
@every_model
def test_a_gguf_lora_is_the_difference_that_merging_makes(kind, tmp_path):
    base = base_file(kind, tmp_path)
    model, folder = adapted(kind, tmp_path)
    export_gguf(folder, base, tmp_path / "own.gguf")
    found, whole = updates_in(tmp_path / "own.gguf"), merged_file(model, tmp_path)
    with open_gguf(base) as before, open_gguf(whole) as after:
        changed = {name for name in after.tensors if not torch.equal(before.values(name), after.values(name))}
        assert found.keys() == changed
        for name, update in found.items():
            torch.testing.assert_close(before.values(name) + update, after.values(name), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:PEFT 0.21 does not load:UserWarning")  # of shared experts
@every_model
def test_llama_cpp_computes_what_minilora_computes(kind, tmp_path):
    pytest.importorskip("xllamacpp")
    base = base_file(kind, tmp_path)
    model, folder = adapted(kind, tmp_path)
    near = 5e-3 if kind in ROUGH else 1e-4
    export_gguf(folder, base, tmp_path / "own.gguf")
    with serving(base, tmp_path / "own.gguf") as url:
        assert distance(url, model, IDS) < near
    with serving(base) as url:
        assert distance(url, tiny.model(kind), IDS) < near, "the base itself"
        assert distance(url, model, IDS) > 0.5, "a test in which the adapter does nothing shows nothing"
    with serving(merged_file(model, tmp_path)) as url:
        assert distance(url, model, IDS) < near


def test_experts_have_factors_of_three_dimensions(tmp_path):
    made = LoraConfig(
        r=3, lora_alpha=7, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    base = base_file("qwen3_moe", tmp_path)
    model, folder = adapted("qwen3_moe", tmp_path, made)
    export_gguf(folder, base, tmp_path / "own.gguf")
    with open_gguf(tmp_path / "own.gguf") as file:
        shapes = {name.removeprefix("blk.1."): info.shape for name, info in file.tensors.items() if "blk.1." in name}
    assert shapes == {
        "ffn_gate_exps.weight.lora_a": (4, 3, 64), "ffn_gate_exps.weight.lora_b": (4, 32, 3),
        "ffn_up_exps.weight.lora_a": (4, 3, 64), "ffn_up_exps.weight.lora_b": (4, 32, 3),
        "ffn_down_exps.weight.lora_a": (4, 3, 32), "ffn_down_exps.weight.lora_b": (4, 64, 3),
    }  # fmt: skip
    pytest.importorskip("xllamacpp")
    with serving(base, tmp_path / "own.gguf") as url:
        assert distance(url, model, IDS) < 1e-4
        assert distance(url, tiny.model("qwen3_moe"), IDS) > 0.5


def test_experts_for_the_converter_are_sent_to_the_served_file(tmp_path):
    made = LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"])
    model, _ = adapted("qwen3_moe", tmp_path, made)
    with pytest.raises(StateError, match=r"llama.cpp takes adapters of linear layers only; give --base SERVED.gguf"):
        export_adapter(model, tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "granite"])
def test_embeddings_and_heads_of_their_own(kind, tmp_path):
    base = base_file(kind, tmp_path)
    model, folder = adapted(kind, tmp_path, config(kind, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    export_gguf(folder, base, tmp_path / "own.gguf")
    assert {"token_embd.weight", "output.weight"} < updates_in(tmp_path / "own.gguf").keys()
    pytest.importorskip("xllamacpp")
    with serving(base, tmp_path / "own.gguf") as url:
        assert distance(url, model, IDS) < 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gemma3_text", "cohere"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]], ids="".join)
def test_a_table_that_tokens_and_head_share_is_refused(kind, targets, tmp_path):
    base = base_file(kind, tmp_path)
    _, folder = adapted(kind, tmp_path, config(kind, target_modules=targets, ensure_weight_tying=True))
    with pytest.raises(StateError, match=r"lm_head: .* has one table for tokens and head, .* write a merged file"):
        export_gguf(folder, base, tmp_path / "own.gguf")
    assert not (tmp_path / "own.gguf").exists()


@pytest.mark.parametrize("kind", ["gemma2", "qwen2"])
def test_a_table_that_tokens_and_head_share_is_merged_into(kind, tmp_path):
    """The way out that the refusal names, for an adapter that was trained on the file."""
    from minilora.hf import load_model

    base = base_file(kind, tmp_path)
    tied = config(kind, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = inject(load_model(str(base)), tied)
    randomize(model, seed=1)
    save_adapter(model, tmp_path / "adapter")
    made = merge_to_gguf(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged.gguf"), "f32")
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(str(made))(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits, rtol=1e-4, atol=1e-4
        )
    alone = inject(load_model(str(base)), config(kind, target_modules=["lm_head"]))
    randomize(alone, seed=1)
    save_adapter(alone, tmp_path / "alone")
    with pytest.raises(StateError, match="one table for tokens and head; adapt the embedding with it"):
        merge_to_gguf(str(base), str(tmp_path / "alone"), str(tmp_path / "no.gguf"), "f32")


def test_a_table_of_places_is_refused(tmp_path):
    base = base_file("gpt2", tmp_path)
    _, folder = adapted("gpt2", tmp_path, config("gpt2", target_modules=["wpe", "c_attn"]))
    with pytest.raises(StateError, match=r"wpe: llama.cpp looks position_embd.weight up without its adapter"):
        export_gguf(folder, base, tmp_path / "no.gguf")


def test_half_the_size_in_f16(tmp_path):
    base = base_file("llama", tmp_path)
    model, folder = adapted("llama", tmp_path)
    export_gguf(folder, base, tmp_path / "f32.gguf")
    export_gguf(folder, base, tmp_path / "f16.gguf", "f16")
    full, half = updates_in(tmp_path / "f32.gguf"), updates_in(tmp_path / "f16.gguf")
    assert all(0 < (full[name] - half[name]).abs().max() < 4e-3 * full[name].abs().max() for name in full)
    assert (tmp_path / "f16.gguf").stat().st_size < 0.75 * (tmp_path / "f32.gguf").stat().st_size
    big = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        next(iter(big.values())).fill_(1e5)
    with pytest.raises(StateError, match="write it in f32"):
        export_gguf(model, base, tmp_path / "no.gguf", "f16")


def test_ranks_differ_and_nothing_is_padded(tmp_path):
    base = base_file("llama", tmp_path)
    made = config("llama", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 2})
    model, folder = adapted("llama", tmp_path, made)
    assert export_gguf(folder, base, tmp_path / "own.gguf") == [3, 5]
    with open_gguf(tmp_path / "own.gguf") as file:
        assert file.tensors["blk.0.attn_v.weight.lora_a"].shape == (5, 64)
    assert updates_in(tmp_path / "own.gguf").keys() == {f"blk.{n}.attn_{x}.weight" for n in (0, 1) for x in "qv"}
    pytest.importorskip("xllamacpp")
    with serving(base, tmp_path / "own.gguf") as url:
        assert distance(url, model, IDS) < 1e-4


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_variants_that_hang_on_their_base_are_written_from_the_model(start, tmp_path):
    base = base_file("llama", tmp_path)
    model, folder = adapted("llama", tmp_path, config("llama", init_lora_weights=start))
    export_gguf(model, base, tmp_path / "own.gguf")
    whole = merged_file(model, tmp_path)
    with open_gguf(base) as before, open_gguf(whole) as after:
        for name, update in updates_in(tmp_path / "own.gguf").items():
            torch.testing.assert_close(before.values(name) + update, after.values(name), rtol=1e-4, atol=1e-4)
    with pytest.raises(StateError, match="--model"):
        export_gguf(folder, base, tmp_path / "no.gguf")


def test_the_wrong_file_or_architecture_is_refused_by_name(tmp_path):
    _, folder = adapted("llama", tmp_path)
    with pytest.raises(CheckpointError, match=r"the adapter is for \[64, 96\]"):
        export_gguf(folder, base_file("llama", tmp_path, intermediate_size=128), tmp_path / "no.gguf")
    path = tmp_path / "other.gguf"
    path.write_bytes(
        base_file("llama", tmp_path).read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
    )
    with pytest.raises(CheckpointError, match="architecture 'mamba' are not tested"):
        export_gguf(folder, path, tmp_path / "no.gguf")
    with pytest.raises(ConfigError, match="f32, f16"):
        export_gguf(folder, path, tmp_path / "no.gguf", "q8_0")
    dora, other = tmp_path / "dora", inject(tiny.model("llama"), config("llama", use_dora=True))
    save_adapter(other, dora)
    with pytest.raises(StateError):
        export_gguf(dora, base_file("llama", tmp_path), tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_the_converters_layout_of_gpt2_is_refused(tmp_path):
    _, folder = adapted("gpt2", tmp_path)
    export_folder(folder, tmp_path / "mlx", "mlx")
    with pytest.raises(StateError, match="give --base"):
        export_folder(folder, tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out").exists()


# ---- merged files


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(("dtype", "near"), [("f16", 2e-2), ("q8_0", 0.5)])
def test_a_merged_file_of_fewer_bits(kind, dtype, near, tmp_path):
    model = tiny.model(kind)
    fill_model(model, tiny.tokenizer(), tmp_path / "x.gguf", dtype)
    fill_model(model, tiny.tokenizer(), tmp_path / "full.gguf", "f32")
    with open_gguf(tmp_path / "x.gguf") as file, open_gguf(tmp_path / "full.gguf") as full:
        kinds = {
            info.kind.name for info in file.tensors.values() if len(info.shape) > 1 and "ffn_gate_inp" not in info.name
        }
        assert kinds - {"F32"} == {dtype.upper()}
        for name in file.tensors:
            step = full.values(name).abs().max() * (
                2**-11 if dtype == "f16" else 1 / 254 + 2**-11
            )  # the scale of a block is fp16
            assert (file.values(name) - full.values(name)).abs().max() <= step
    pytest.importorskip("xllamacpp")
    if kind != "qwen3_moe" or dtype == "f16":  # one router's choice that flips is no rounding
        with serving(tmp_path / "x.gguf") as url:
            assert distance(url, model, IDS) < near


def test_llama_cpp_makes_the_same_tokens(tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = tiny.tokenizer()
    with serving(base_file("llama", tmp_path)) as url:
        for text in ("the  other 12 things\n\n", "naïve 日本語", "<|im_start|>user\nthe<|im_end|>"):
            ids = post(url, "/tokenize", content=text, parse_special=True)["tokens"]
            assert ids == tokenizer(text)["input_ids"]


def test_of_several_chat_templates_the_usual_one_is_written(tmp_path):
    tokenizer = tiny.tokenizer()
    usual = tokenizer.chat_template
    tokenizer.chat_template = {"tool_use": "other", "default": usual}
    fill_model(tiny.model("llama"), tokenizer, tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.metadata["tokenizer.chat_template"] == usual


def odd_tokenizers():
    """Each has what no GGUF file says: an added token that takes the space beside it, or a model that marks the ends of words."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    for side in ("lstrip", "rstrip", "single_word"):
        made = tiny.tokenizer()
        made.add_tokens([AddedToken("<X>", **{side: True})])
        yield made, f"'<X>' has {side}=True"
    for entry, value in (("end_of_word_suffix", "</w>"), ("dropout", 0.5)):
        content = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
        content["model"][entry] = value
        backend = Tokenizer.from_str(json.dumps(content))
        yield PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>"), f"{entry}="


def test_a_tokenizer_or_config_that_llama_cpp_would_misread_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    odd = tiny.tokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    )
    with pytest.raises(CheckpointError, match="cuts text by a rule"):
        fill_model(tiny.model("llama"), odd, tmp_path / "no.gguf")
    for odd, words in odd_tokenizers():
        with pytest.raises(CheckpointError, match=words):
            fill_model(tiny.model("llama"), odd, tmp_path / "no.gguf")
    for kind, field, value in (
        ("llama", "hidden_act", "gelu"),
        ("qwen3_moe", "norm_topk_prob", False),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "attn_logit_softcapping", None),
        *(
            (kind, "attention_bias", True)
            for kind in ("qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "cohere")
        ),
        *((kind, "attention_bias", True) for kind in ("qwen3_moe", "olmoe")),
        ("gpt_neox", "attention_bias", False),
        *((kind, "tie_word_embeddings", True) for kind in ("phi", "stablelm", "olmo2", "gpt_neox")),
    ):
        with pytest.raises(CheckpointError, match=field):
            fill_model(tiny.model(kind, **{field: value}), tiny.tokenizer(), tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(
            (kind, {"sliding_window": 8}) for kind in ("mistral", "phi3", "starcoder2")
        ),  # of which llama.cpp knows nothing
        *((kind, {"attention_bias": True, "mlp_bias": True}) for kind in ("llama", "granite")),
        ("qwen2_moe", {"qkv_bias": False}),
        ("falcon", {"multi_query": False}),
    ],
)
def test_what_a_config_may_ask_for_is_computed(kind, fields, tmp_path):
    pytest.importorskip("xllamacpp")
    with serving(base_file(kind, tmp_path, **fields)) as url:
        assert distance(url, tiny.model(kind, **fields), IDS) < (5e-3 if kind in ROUGH else 1e-4)


def test_a_context_that_is_shortened_to_the_window_is_said(tmp_path, capsys):
    tiny.model("phi3", sliding_window=8).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    _, adapter = adapted("phi3", tmp_path, sliding_window=8)
    made = merge_to_gguf(str(tmp_path / "model"), str(adapter), str(tmp_path / "merged.gguf"))
    assert "merged.gguf: says a context of 8 tokens, its window, and not 64" in capsys.readouterr().out
    with open_gguf(made) as file:
        assert file.metadata["phi3.context_length"] == file.metadata["phi3.attention.sliding_window"] == 8


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "linear", "factor": 4.0},
])  # fmt: skip
def test_stretched_rotary_angles(scaling, tmp_path):
    pytest.importorskip("xllamacpp")
    fields = {"rope_parameters": {"rope_theta": 500.0, **scaling}}
    with serving(base_file("llama", tmp_path, **fields)) as url:
        assert distance(url, tiny.model("llama", **fields), IDS) < 1e-4
        assert distance(url, tiny.model("llama"), IDS) > 1e-2


def test_stretched_rotary_angles_of_every_kind_are_written_or_refused(tmp_path):
    pytest.importorskip("xllamacpp")
    linear, llama3 = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, {"rope_type": "llama3", "factor": 8.0}
    plain = {"rope_type": "default", "rope_theta": 700.0}
    llama3 |= {"rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    layers = {"num_hidden_layers": 7, "sliding_window": 4}
    both = {"full_attention": linear, "sliding_attention": plain}
    for kind, fields in (("cohere", {"rope_parameters": linear}), ("gemma3_text", layers | {"rope_parameters": both})):
        with serving(base_file(kind, tmp_path, **fields)) as url:
            assert distance(url, tiny.model(kind, **fields), IDS) < (5e-3 if kind in ROUGH else 1e-4)
    for kind, rope, words in (
        ("mistral", llama3, "llama3"),
        ("gemma3_text", both | {"full_attention": llama3}, "llama3"),
        ("gemma3_text", both | {"sliding_attention": linear}, "linear"),
    ):
        fields = {"rope_parameters": rope} | (layers if kind == "gemma3_text" else {})
        with pytest.raises(CheckpointError, match=words):
            fill_model(tiny.model(kind, **fields), tiny.tokenizer(), tmp_path / "no.gguf")


def folder_of(kind, path):
    """The tiny model as a folder, so that a command can name it."""
    tiny.model(kind).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_merge_onto_a_file_keeps_what_the_adapter_does_not_change(tmp_path):
    base = base_file("llama", tmp_path, "q8_0")
    base_model = tmp_path / "again.gguf"
    shutil.copy(base, base_model)
    from minilora.hf import load_model

    loaded = load_model(str(base_model), torch.float32)
    model = get_peft_model(loaded, config("llama", target_modules=["q_proj", "down_proj"]))
    randomize(model, seed=1)
    save_adapter(model, tmp_path / "adapter")
    made = merge_to_gguf(str(base_model), str(tmp_path / "adapter"), str(tmp_path / "merged.gguf"), "f32")
    with open_gguf(base) as before, open_gguf(made) as after:
        assert {key: value for key, value in after.metadata.items() if key != "general.file_type"} == {
            key: value for key, value in before.metadata.items() if key != "general.file_type"
        }
        assert list(before.tensors) == list(after.tensors)
        for name, info in before.tensors.items():
            if "attn_q" in name or "ffn_down" in name:
                assert after.tensors[name].kind.name == "F32"
                assert not torch.equal(before.values(name), after.values(name))
            else:
                assert after.tensors[name].kind == info.kind and torch.equal(before.blocks(name), after.blocks(name))
    pytest.importorskip("xllamacpp")
    with serving(made) as url:
        assert distance(url, model, IDS) < 0.3  # llama.cpp rounds what it multiplies with Q8_0 to eight bits too
    with serving(base) as url:
        assert distance(url, model, IDS) > 0.5


# ---- the command line


def test_commands(tmp_path, capsys):
    folder, base = folder_of("llama", tmp_path / "model"), base_file("llama", tmp_path)
    _, adapter = adapted("llama", tmp_path)
    place = ["--adapter", str(adapter)]
    assert (
        main(
            [
                "export",
                *place,
                "--for",
                "llama.cpp",
                "--base",
                str(base),
                "--out",
                str(tmp_path / "a.gguf"),
                "--dtype",
                "f16",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "GGUF LoRA in f16, rank 3" in said and f"llama-server -m {base} --lora" in said
    with open_gguf(tmp_path / "a.gguf") as file:
        assert {info.kind.name for info in file.tensors.values()} == {"F16"}
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "base.gguf").write_bytes(base.read_bytes())
    of_folder = ["--base", str(tmp_path / "served"), "--out", str(tmp_path / "b.gguf"), "--dtype", "f16"]
    assert main(["export", *place, "--for", "llama.cpp", *of_folder]) == 0
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    capsys.readouterr()
    merge, no = ["merge", "--model", str(folder), *place], str(tmp_path / "no.gguf")
    for dtype in ("q8_0", "f16", "f32"):
        out = tmp_path / f"{dtype}.gguf"
        assert main([*merge, "--gguf", dtype, "--out", str(out)]) == 0
        with open_gguf(out) as file:
            assert file.architecture == "llama" and file.tensors["blk.0.attn_q.weight"].kind.name == dtype.upper()
    capsys.readouterr()
    for flags, wanted in (
        (["export", *place, "--for", "ollama", "--out", str(tmp_path / "no")], "--base"),
        (["export", *place, "--for", "vllm", "--base", str(base), "--out", str(tmp_path / "no")], "has no use for a GGUF file"),
        (["export", *place, "--for", "llama.cpp", "--dtype", "f16", "--out", str(tmp_path / "no")], "--base"),
        (["export", *place, "--for", "llama.cpp", "--base", str(base), "--out", str(tmp_path / "no")], ".gguf"),
        (["export", *place, "--for", "llama.cpp", "--base", str(base), "--out", str(tmp_path / "a.gguf")], "exists"),
        ([*merge, "--gguf", "q4_k", "--out", no], "q8_0, f16, f32"),
        ([*merge, "--gguf", "f16", "--out", str(tmp_path / "no")], ".gguf"),
        ([*merge, "--gguf", "f16", "--dtype", "float16", "--out", no], "leave one out"),
    ):  # fmt: skip
        assert main(flags) == 2
        assert wanted in capsys.readouterr().err
    assert not list(tmp_path.glob("no*"))


def test_a_folder_for_ollama(tmp_path, capsys):
    base = base_file("llama", tmp_path)
    _, adapter = adapted("llama", tmp_path)
    out = tmp_path / "for-ollama"
    assert main(["export", "--adapter", str(adapter), "--for", "ollama", "--base", str(base), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "adapter.gguf"]
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {base}", "ADAPTER ./adapter.gguf"] and 'PARAMETER stop "<|im_end|>"' in lines
    assert "ollama create for-ollama" in capsys.readouterr().out


def test_the_word_for_the_file_of_the_demo_is_taken_as_the_base(tmp_path, capsys, monkeypatch):
    base, (_, adapter) = base_file("llama", tmp_path), adapted("llama", tmp_path)
    monkeypatch.setattr("minilora.hf.load.smollm2_file", lambda: base)
    out = str(tmp_path / "a.gguf")
    asked = ["export", "--adapter", str(adapter), "--for", "llama.cpp", "--base", "smollm2.gguf", "--out", out]
    assert main(asked) == 0 and f"llama-server -m {base} --lora {out}" in capsys.readouterr().out


def test_a_family_of_chat_templates_is_known_by_what_it_writes():
    from minilora.export.ollama import family_of
    from minilora.hf.jinja import write_chat
    from tests.models import CHATML

    def found(template):
        family, system = family_of(lambda turns: write_chat(template, turns))
        return family and family.name, system

    usual = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    assert found(CHATML) == ("ChatML", "")
    assert found(usual + CHATML) == ("ChatML", "Be kind.")
    assert found(CHATML.replace("<|im_end|>", "<|end|>")) == (None, "")
    phi = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{{ '<|assistant|>\\n' }}"
    assert found(phi) == ("Phi-3", "")
    assert found("{{ raise_exception('no') }}") == (None, "")
