"""Exports, read back by the rules of the program that takes them: what it computes is the adapter's own update."""

import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora
from minilora import LoraConfig, MiniLoraError, PeftModel, QuantConfig, inject, quantize_model, save_adapter
from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.export.factors import GGUF
from minilora.export.folders import TARGETS, export_adapter, export_folder, refusal
from minilora.export.programs import max_lora_rank
from minilora.export.servers import servers_of
from minilora.export.stored import stored_factors
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import SEAL_FILE, read_adapter
from minilora.store.load import CONFIG_FILE, WEIGHTS_FILE

ALL = ["q_proj", "v_proj", "down_proj"]
PREFIX = "base_model.model."
every_target = pytest.mark.parametrize("target", ["vllm", "llama.cpp", "mlx"])


def lora(targets=ALL, **fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets, **fields})


# ---- the readers


def read(folder, weights=WEIGHTS_FILE):
    assert sorted(path.name for path in folder.iterdir()) == sorted([weights, CONFIG_FILE, SEAL_FILE])
    return json.loads((folder / CONFIG_FILE).read_text()), safetensors.torch.load_file(folder / weights)


def pairs(tensors):
    """Path to ``(A, B)`` of a file in PEFT's layout, in which nothing else may be."""
    found = {}
    for key, tensor in tensors.items():
        assert key.startswith(PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight")), key
        path, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        found.setdefault(path, {})[which] = tensor
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def read_vllm(folder):
    """``PEFTHelper`` of vLLM: three keys it needs, what it refuses, and one scale for all layers."""
    config, tensors = read(folder)
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["bias"] == "none" and not config["use_dora"] and not config["modules_to_save"]
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    endings = {path.rsplit(".", 1)[-1] for path in pairs(tensors)}
    assert endings <= set(config["target_modules"]), "vLLM refuses a tensor of a module that is not named"
    assert all(len(A) == config["r"] for A, _ in pairs(tensors).values())
    return {path: scale * B @ A for path, (A, B) in pairs(tensors).items()}


def read_llama_cpp(folder):
    """``convert_lora_to_gguf``: alpha over the rank of each tensor; Ollama takes whole numbers and no scalars."""
    config, tensors = read(folder)
    alpha = config["lora_alpha"]
    assert type(alpha) is int and alpha > 0, "Ollama reads an unsigned integer"
    assert all(tensor.dim() == 2 and tensor.dtype == torch.float32 for tensor in tensors.values())
    return {path: alpha / len(A) * B @ A for path, (A, B) in pairs(tensors).items()}


def read_mlx(folder):
    """``linear_to_lora_layers``: ``y = Wx + scale * (x @ lora_a) @ lora_b``, keys the whole paths of layers, -1 for all blocks."""
    config, tensors = read(folder, "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1 and parameters["dropout"] == 0.0
    paths = {key.rpartition(".")[0] for key in tensors}
    assert tensors.keys() == {f"{path}.{half}" for path in paths for half in ("lora_a", "lora_b")}
    assert sorted(paths) == parameters["keys"]
    for path in paths:
        assert tensors[f"{path}.lora_a"].shape[1] == parameters["rank"] == tensors[f"{path}.lora_b"].shape[0]
    return {path: parameters["scale"] * (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T for path in paths}


READERS = {"vllm": read_vllm, "llama.cpp": read_llama_cpp, "mlx": read_mlx}


def test_every_target_has_a_reader():
    assert READERS.keys() | {"diffusers"} == set(TARGETS)  # of whose models test_in_diffusers.py has some


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


# ---- what is exported


CASES = {
    "lora": ({}, None),
    "rslora": ({"use_rslora": True, "lora_alpha": 7}, None),
    "fraction": ({"lora_alpha": 2.5}, None),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 31}}, None),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2, "down_proj": 7}}, None),
    "both patterns, rslora": ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 5}}, None),
    "regex": ({"target_modules": r".*\.1\..*(q|up)_proj", "rank_pattern": {r".*q_proj": 3}}, None),
    "one layer": ({"layers_to_transform": [1], "layers_pattern": "layers"}, None),
    "dropout": ({"lora_dropout": 0.3}, None),
    "pissa": ({"init_lora_weights": "pissa"}, None),
    "pissa, rslora": ({"init_lora_weights": "pissa_niter_2", "use_rslora": True}, None),
    "olora": ({"init_lora_weights": "olora"}, None),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, None),
    "vera": ({}, "vera"),
    "lora_fa": ({}, "lora_fa"),
    "lora_xs": ({"use_rslora": True, "lora_alpha": 7}, "lora_xs"),
}  # fmt: skip
# The rank that every layer has in the file: PiSSA and OLoRA need twice theirs, others are filled up to the largest.
RANKS = {"rank_pattern": 7, "pissa": 8, "pissa, rslora": 8, "olora": 8}


@pytest.fixture
def adapted(make_llama, randomize):
    """``adapted(fields, variant, name)``: a tiny Llama with a trained-looking adapter."""

    def make(fields, variant=None, name="default", **model):
        return randomize(inject(make_llama(**model), lora(**{"targets": ALL, **fields}) if "target_modules" not in fields
                                else LoraConfig(**{"r": 4, "lora_alpha": 12, **fields}), name, variant))  # fmt: skip

    return make


@every_target
@pytest.mark.parametrize("case", CASES)
def test_the_reader_finds_the_update(adapted, tmp_path, target, case):
    model = adapted(*CASES[case])
    want = {path: value.delta_weight() for path, value in adapters_of(model).named("default").items()}
    rank = export_adapter(model, tmp_path / "out", target)
    assert rank == RANKS.get(case, 4)
    got = READERS[target](tmp_path / "out")
    assert got.keys() == want.keys()
    for path in want:
        assert want[path].norm() > 0.1
        close(got[path], want[path])


@every_target
def test_a_packed_base_and_a_named_adapter(make_llama, randomize, tmp_path, target, snapshot):
    model = quantize_model(make_llama(), QuantConfig(double_quant=True))
    randomize(inject(model, lora("all-linear"), "one"))
    inject(model, lora(["q_proj"], r=2), "two")
    before = snapshot(model)
    export_adapter(model, tmp_path / "out", target, "one")
    assert snapshot(model) == before
    got = READERS[target](tmp_path / "out")
    for path, value in adapters_of(model).named("one").items():
        close(got[path], value.delta_weight())
    assert len(got) == 14


def test_llama_cpps_converter_turns_conv1d(make_gpt2, randomize, tmp_path):
    with pytest.raises(StateError, match=r"the wrong way round; give --base SERVED\.gguf"):
        export_adapter(inject(make_gpt2(), lora(["c_attn"])), tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out").exists()


def test_conv1d_keeps_the_orientation_of_the_layout(make_gpt2, randomize, tmp_path):
    model = randomize(inject(make_gpt2(), lora(["c_attn", "mlp.c_proj"])))
    export_adapter(model, tmp_path / "out", "mlx")
    own = {
        path.replace("transformer.", "model.", 1): value for path, value in adapters_of(model).named("default").items()
    }
    found = read_mlx(tmp_path / "out")
    assert found.keys() == own.keys()
    for path, delta in found.items():
        close(delta, own[path].delta_weight())


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"regex", "one layer"}))
def test_an_export_is_itself_an_adapter(adapted, make_llama, ids, tmp_path, target, case):
    """In PEFT's layout, so that minilora reads it too: the logits are the same."""
    model = adapted(*CASES[case])
    export_adapter(model, tmp_path / "out", target)
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_nothing_is_in_the_config_that_a_reader_could_skip(adapted, tmp_path, target):
    fields = {"use_rslora": True, "alpha_pattern": {"v_proj": 31}, "rank_pattern": {"q_proj": 6}, "lora_dropout": 0.2,
              "layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["down_proj"]}  # fmt: skip
    export_adapter(adapted(fields), tmp_path / "out", target)
    config, _ = read(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (6, 6, False, 0.0)
    assert (config["rank_pattern"], config["alpha_pattern"], config["exclude_modules"]) == ({}, {}, None)
    assert config["layers_to_transform"] is None and config["layers_pattern"] is None
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True and config["bias"] == "none" and config["modules_to_save"] is None


@every_target
def test_a_bias_setting_without_biases_does_not_stop_the_reader(adapted, tmp_path, target):
    """Llama's layers have none, so nothing was trained; vLLM refuses a file that says otherwise."""
    model = adapted({"bias": "lora_only"})
    export_adapter(model, tmp_path / "out", target)
    assert READERS[target](tmp_path / "out").keys() == adapters_of(model).named("default").keys()


# ---- from a folder


@every_target
@pytest.mark.parametrize(
    "case",
    ["lora", "rslora", "fraction", "alpha_pattern", "rank_pattern", "both patterns, rslora", "orthogonal", "lora_fa"],
)
def test_the_folder_alone_gives_the_same_tensors(adapted, tmp_path, target, case):
    model = adapted(*CASES[case])
    save_adapter(model, tmp_path / "adapter")
    ranks = (
        export_adapter(model, tmp_path / "left", target),
        export_folder(tmp_path / "adapter", tmp_path / "right", target),
    )
    assert ranks[0] == ranks[1]
    weights = "adapters.safetensors" if target == "mlx" else WEIGHTS_FILE
    (left, one), (right, other) = read(tmp_path / "left", weights), read(tmp_path / "right", weights)
    for content in (left, right):  # only the model knows what it is called
        content.pop("auto_mapping", None), content.pop("base_model_name_or_path", None)
    assert one.keys() == other.keys() and left == right
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


@every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_folder_in_half_precision_is_written_in_fp32(adapted, tmp_path, target, dtype):
    save_adapter(adapted({}), tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL_FILE).unlink()
    file = tmp_path / "adapter" / WEIGHTS_FILE
    tensors = {key: tensor.to(dtype) for key, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    export_folder(tmp_path / "adapter", tmp_path / "out", target)
    want = {path: 3.0 * B.float() @ A.float() for path, (A, B) in pairs(tensors).items()}
    for path, delta in READERS[target](tmp_path / "out").items():
        close(delta, want[path])


@every_target
@pytest.mark.parametrize("case", ["pissa", "olora", "vera", "lora_xs"])
def test_a_variant_that_needs_its_base_is_refused_from_the_folder(adapted, tmp_path, target, case):
    save_adapter(adapted(*CASES[case]), tmp_path / "adapter")
    with pytest.raises(StateError, match=rf"a {case} adapter depends on its base model; give it with --model"):
        export_folder(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "mlx", GGUF])
@pytest.mark.parametrize(
    ("fields", "words", "way"),
    [
        ({"use_dora": True}, "DoRA rescales every row", "minilora merge makes a whole model of it"),
        ({"alora_invocation_tokens": [3, 5]}, "changes some tokens and not others", "run it in minilora or PEFT"),
    ],
    ids=["dora", "alora"],
)
def test_where_no_base_would_help_none_is_asked_for(adapted, tmp_path, target, fields, words, way):
    if target == "mlx" and "use_dora" in fields:
        pytest.skip("it holds DoRA")
    save_adapter(adapted(fields), tmp_path / "adapter")
    stored = read_adapter(tmp_path / "adapter")
    with pytest.raises(StateError, match=rf"{words}.*, and .* holds no such adapter; {way}") as caught:
        stored_factors(stored, target)
    assert "--model" not in str(caught.value) and refusal(stored, target) == (
        str(caught.value).removeprefix(f"{stored.path}: "),
        False,
    )
    if target != GGUF:
        with pytest.raises(StateError, match=words):
            export_folder(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


class Reads(TorchDispatchMode):
    """How many numbers the largest tensor had that an operation made, those on "meta" aside."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and not t.is_meta}
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor) and not each.is_meta and each.untyped_storage().data_ptr() not in held:
                self.most = max(self.most, each.numel())
        return out


SHAPES = {
    **{name: ({**fields, "variant": kind}) for name, (fields, kind) in CASES.items() if name != "regex"},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [3, 5]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "copy": {"modules_to_save": ["lm_head"]},
    "bias": {"lora_bias": True},
    "rank": {"r": 600, "target_modules": ["q_proj"]},
    "overflow": {"lora_alpha": 1e30},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", SHAPES)
def test_whether_a_program_takes_it_is_told_by_shapes_as_the_export_tells_it(adapted, tmp_path, target, case):
    fields = dict(SHAPES[case])
    model = adapted(fields, fields.pop("variant", None))
    if case == "overflow":
        with torch.no_grad():
            adapters_of(model).named("default")["model.layers.1.mlp.down_proj"].lora_B.mul_(1e12)
    save_adapter(model, tmp_path / "adapter")
    stored, part = read_adapter(tmp_path / "adapter"), "text_encoder" if target == "diffusers" else None
    with Reads() as reads:
        said, _ = refusal(stored, target, part)
    assert reads.most <= 2, "the ends of what a tensor holds, and no copy of it"
    assert said == refused(
        lambda: export_folder(tmp_path / "adapter", tmp_path / "out", target, component=part), stored
    )
    assert (case != "overflow" or "NaN or infinity" in said) and (
        case != "lora" or target == "diffusers" or said is None
    )


def refused(call, stored):
    """What a call raises, without the file's name; None for nothing."""
    try:
        call()
    except MiniLoraError as error:
        return str(error).removeprefix(f"{stored.path}: ")
    return None


@every_target
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_no_regular_expression_of_a_file_is_run(adapted, tmp_path, target, field):
    """As in ``load_adapter``: the pattern could hang the reader, so the file is refused."""
    save_adapter(adapted({}), tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL_FILE).unlink()
    file = tmp_path / "adapter" / CONFIG_FILE
    content = json.loads(file.read_text())
    content[field] = {r"(q|v)_proj": 4}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{field}.*regular expression"):
        export_folder(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@every_target
def test_a_folder_whose_rank_is_not_the_configs_is_refused(adapted, tmp_path, target):
    """Otherwise its scale would be a guess."""
    save_adapter(adapted({}), tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL_FILE).unlink()
    file = tmp_path / "adapter" / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))
    with pytest.raises(MiniLoraError, match=r"rank|lora_A"):
        export_folder(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@every_target
@pytest.mark.parametrize("fault", ["damaged", "half", "missing"])
def test_a_damaged_folder_is_named(adapted, tmp_path, target, fault):
    save_adapter(adapted({}), tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL_FILE).unlink()
    file = tmp_path / "adapter" / WEIGHTS_FILE
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:-3])
    elif fault == "missing":
        file.unlink()
    else:
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({k: v for k, v in tensors.items() if "0.mlp.down_proj.lora_A" not in k}, file)
    match = {"damaged": "damaged", "missing": "cannot be read", "half": "down_proj has only one of lora_A and lora_B"}[
        fault
    ]
    with pytest.raises(MiniLoraError, match=match):
        export_folder(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


# ---- refusals

REFUSED = {
    "dora": ({"use_dora": True}, "DoRA|a dora adapter"),
    "lora_bias": ({"lora_bias": True}, "lora_bias|lora_B.bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head.*(copy|no factor)"),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.*(linear layers only|no factor)"),
    "token rows": ({"trainable_token_indices": [3, 5]}, "TokenRows|embed_tokens"),
    "bias": ({"bias": "all", "model": {"attention_bias": True}}, "bias.*(copy or bias|no factor)"),
}


@every_target
@pytest.mark.parametrize("way", ["model", "folder"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_hold_is_named_and_nothing_written(adapted, tmp_path, target, way, case):
    if (target, case) in {("mlx", "dora"), ("mlx", "embedding"), ("vllm", "embedding")}:
        pytest.skip("it holds these: test_in_mlx.py, and below")
    fields, match = REFUSED[case]
    fields = dict(fields)
    model = adapted(fields, **fields.pop("model", {}))
    save_adapter(model, tmp_path / "adapter")
    calls = {
        "model": lambda out: export_adapter(model, out, target),
        "folder": lambda out: export_folder(tmp_path / "adapter", out, target),
    }
    call = calls[way]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG_FILE).write_text("kept")
    for out in ("new", "old"):
        with pytest.raises(StateError, match=match):
            call(tmp_path / out)
    assert not (tmp_path / "new").exists()
    assert [(p.name, p.read_text()) for p in (tmp_path / "old").iterdir()] == [(CONFIG_FILE, "kept")]


@pytest.mark.parametrize("targets", [["c_attn"], ["lm_head"], ["wte"]], ids=str)
def test_vllm_takes_no_adapter_of_gpt2(make_gpt2, randomize, tmp_path, targets):
    model = randomize(inject(make_gpt2(tie_word_embeddings=False), lora(targets)))
    save_adapter(model, tmp_path / "adapter")
    for call in (
        lambda: export_adapter(model, tmp_path / "out", "vllm"),
        lambda: export_folder(tmp_path / "adapter", tmp_path / "out", "vllm"),
    ):
        with pytest.raises(StateError, match=r"vLLM takes no adapters of GPT-2.*; merge it instead"):
            call()
    assert not (tmp_path / "out").exists()
    (vllm,) = [each for each in servers_of(read_adapter(tmp_path / "adapter"), tmp_path) if each.name == "vLLM"]
    assert vllm.takes == "no" and "GPT-2" in vllm.why and "minilora merge" in vllm.why


def test_a_plain_folder_goes_to_llama_cpp_with_its_converter_or_without(make_llama, tmp_path):
    save_adapter(inject(make_llama(), lora(["q_proj"])), tmp_path / "adapter")
    (found,) = [each for each in servers_of(read_adapter(tmp_path / "adapter"), tmp_path) if each.name == "llama.cpp"]
    assert found.takes == "as it is" and "convert_lora_to_gguf.py" in found.why
    assert f"export --adapter {tmp_path} --for llama.cpp --out NEW.gguf --base SERVED.gguf" in found.why


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_a_tied_head_that_follows_the_embedding_is_refused(make_llama, randomize, tmp_path, target):
    base = make_llama(tie_word_embeddings=True)
    model = randomize(inject(base, lora(["embed_tokens"], ensure_weight_tying=True)))
    with pytest.raises(StateError, match=r"takes adapters of linear layers( and embeddings)? only"):
        export_adapter(model, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["vllm", "mlx"])
def test_a_folder_with_an_embedding_wants_its_base(make_llama, randomize, tmp_path, target):
    save_adapter(randomize(inject(make_llama(), lora(["embed_tokens", "q_proj"]))), tmp_path / "adapter")
    with pytest.raises(StateError, match=r"embed_tokens.*(is of an embedding|own table).*give the base with --model"):
        export_folder(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_an_embedding_for_vllm_is_laid_out_as_peft_does(make_llama, randomize, ids, tmp_path):
    model = randomize(inject(make_llama(), lora(["embed_tokens", "q_proj"], r=3, rank_pattern={"embed_tokens": 2})))
    assert export_adapter(model, tmp_path / "out", "vllm") == 3
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_mlx_wants_the_base_of_what_stands_outside_the_blocks(make_llama, randomize, tmp_path):
    model = randomize(inject(make_llama(), lora(["lm_head"])))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(StateError, match=r"lm_head\..*own table.*--model"):
        export_folder(tmp_path / "adapter", tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()
    export_adapter(model, tmp_path / "out", "mlx")
    close(read_mlx(tmp_path / "out")["lm_head"], adapters_of(model).named("default")["lm_head"].delta_weight())


@pytest.mark.parametrize("entry", ["lm_head", "embed_tokens"])
def test_mlx_has_one_module_for_a_tied_head_and_its_embedding(make_llama, randomize, tmp_path, entry):
    base = make_llama(tie_word_embeddings=True)
    model = randomize(inject(base if entry == "lm_head" else minilora.untie(base), lora([entry])))
    with pytest.raises(StateError, match=rf"{entry}: the head is tied"):
        export_adapter(model, tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_vllm_never_takes_is_refused(make_llama, tmp_path):
    model = inject(make_llama(), lora(["q_proj"], r=513))
    with pytest.raises(StateError, match="vLLM takes ranks up to 512 only, and this one has 513"):
        export_adapter(model, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "taken"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512), (513, None)])
def test_the_hint_names_a_rank_that_vllm_takes(rank, taken):
    assert max_lora_rank(rank) == taken


@pytest.mark.parametrize("target", ["vLLM", "gguf", ""])
def test_an_unknown_target_lists_the_known(adapted, tmp_path, target):
    for call in (lambda: export_adapter(adapted({}), tmp_path / "out", target),
                 lambda: export_folder(tmp_path / "adapter", tmp_path / "out", target)):  # fmt: skip
        with pytest.raises(ConfigError, match=r"wanted one of vllm, llama\.cpp, mlx"):
            call()
    assert not (tmp_path / "out").exists()


def test_an_unknown_adapter_or_none(adapted, tmp_path):
    with pytest.raises(StateError, match="no adapter is called 'z'"):
        export_adapter(adapted({}), tmp_path / "out", "vllm", "z")
    with pytest.raises(StateError, match="has no adapters"):
        export_adapter(nn.Linear(2, 3), tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


@every_target
@pytest.mark.parametrize("state", ["merged", "disabled", "aside"])
def test_whatever_shows_the_export_is_the_same(adapted, tmp_path, target, state):
    model = adapted({})
    export_adapter(model, tmp_path / "left", target)
    if state == "merged":
        minilora.merge(model)
    elif state == "aside":
        inject(model, lora(["q_proj"]), "other")
    if state == "disabled":
        with minilora.many.adapted.disabled(model):
            export_adapter(model, tmp_path / "right", target)
            assert not any(isinstance(module, minilora.Adapter) for module in model.modules())
    else:
        export_adapter(model, tmp_path / "right", target)
    for file in (tmp_path / "left").iterdir():
        assert file.read_bytes() == (tmp_path / "right" / file.name).read_bytes()


# ---- the command


@every_target
@pytest.mark.parametrize("case", ["lora", "rslora"])
def test_the_command_exports_a_folder(adapted, tmp_path, capsys, target, case):
    model = adapted(*CASES[case])
    save_adapter(model, tmp_path / "adapter")
    assert (
        main(["export", "--adapter", str(tmp_path / "adapter"), "--for", target, "--out", str(tmp_path / "out")]) == 0
    )
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: adapter for {target}, rank 4, scale 1" in printed
    assert ("--max-lora-rank 8 or more" in printed) is (target == "vllm")
    for path, delta in READERS[target](tmp_path / "out").items():
        close(delta, adapters_of(model).named("default")[path].delta_weight())


@every_target
def test_the_command_exports_a_variant_with_its_base(adapted, make_llama, tmp_path, capsys, monkeypatch, target):
    model = adapted(*CASES["pissa"])
    save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr("minilora.hf.load_model", lambda name, **_: {"tiny": make_llama()}[name])
    arguments = ["export", "--adapter", str(tmp_path / "adapter"), "--for", target, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "give it with --model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*arguments, "--model", "tiny"]) == 0
    assert "rank 8" in capsys.readouterr().out
    for path, delta in READERS[target](tmp_path / "out").items():
        close(delta, adapters_of(model).named("default")[path].delta_weight())


@pytest.mark.parametrize("fault", ["no folder", "dora", "damaged"])
def test_the_command_ends_with_2_and_one_line(adapted, tmp_path, capsys, fault):
    if fault != "no folder":
        save_adapter(adapted({"use_dora": fault == "dora"}), tmp_path / "adapter")
    if fault == "damaged":
        (tmp_path / "adapter" / SEAL_FILE).unlink()
        (tmp_path / "adapter" / WEIGHTS_FILE).write_bytes(b"no")
    assert (
        main(["export", "--adapter", str(tmp_path / "adapter"), "--for", "vllm", "--out", str(tmp_path / "out")]) == 2
    )
    captured = capsys.readouterr()
    assert str(tmp_path / "adapter") in captured.err and len(captured.err.strip().splitlines()) == 1
    assert captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--for", "gguf"], ["--for"], []], ids=str)
def test_the_command_wants_a_known_target(tmp_path, capsys, arguments):
    assert main(["export", "--adapter", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "--for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
