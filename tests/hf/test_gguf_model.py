"""Models from GGUF files: the numbers that transformers computes, the bytes that lie in the file, and refusals by name."""

import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")
import gguf

from minilora import LoraConfig, get_peft_model
from minilora.errors import CheckpointError
from minilora.gguf.file import open_gguf
from minilora.hf import load_model
from minilora.hf.gguf_config import KNOWN, _factors, gguf_config_of
from minilora.hf.gguf_model import _empty, held
from minilora.hf.load import skeleton
from minilora.hf.plan import predicted
from minilora.hf.trials import PlanJob
from minilora.linear.gguf import GGUFLinear
from minilora.linear.layers import dense_weight, is_conv1d
from minilora.linear.packed import QuantLinear
from minilora.quant.config import QuantConfig
from minilora.quant.gguf.formats import FORMATS
from tests import gguf_files
from tests.gguf_files import ARCHITECTURES, VOCABULARY, tiny, write_gguf
from tests.llama_cpp import distance, post, serving

IDS = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(1))

MIXTURES = ("olmoe", "qwen2moe", "qwen3moe")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_each_known_architecture_is_tested():
    assert set(KNOWN) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_numbers_are_the_model_that_the_file_was_made_of(architecture, tmp_path):
    model = tiny(architecture)
    found = load_model(str(write_gguf(tmp_path / "model.gguf", model)))
    assert torch.equal(logits(found), logits(model))
    assert not found.training and found.generation_config.eos_token_id == 257


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_stay_packed_and_are_what_gguf_decodes(architecture, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny(architecture), "Q5_1", "Q8_0")
    found = load_model(str(path))
    layers = {name: layer for name, layer in found.named_modules() if isinstance(layer, GGUFLinear)}
    assert len(layers) == held(path)[0].get("Q5_1", 0) + held(path)[0].get("Q8_0", 0)
    dense = skeleton(str(path))
    linear = [name for name, layer in dense.named_modules() if isinstance(layer, torch.nn.Linear) or is_conv1d(layer)]
    assert set(linear) - set(layers) <= {"lm_head"}
    with torch.no_grad():  # the dense twin: every packed weight decoded where it stands
        twin = load_model(str(path))
        for name, layer in layers.items():
            own = dense.get_submodule(name)
            weight = dense_weight(layer)
            plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
            assert weight.shape == (own.weight.t().shape if is_conv1d(own) else own.weight.shape)
            plain.weight.copy_(weight)
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
            twin.set_submodule(name, plain)
    torch.testing.assert_close(logits(found), logits(twin), rtol=1e-5, atol=1e-5)
    with open_gguf(path) as file:
        name, target = {
            "gpt2": ("blk.1.ffn_up.weight", "transformer.h.1.mlp.c_fc"),
            "starcoder2": ("blk.1.ffn_up.weight", "model.layers.1.mlp.c_fc"),
            **dict.fromkeys(MIXTURES, ("blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj")),
        }.get(architecture, ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"))
        assert torch.equal(layers[target].codes, file.blocks(name))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_weights_are_those_of_transformers_own_reader(architecture, tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    model = tiny(
        architecture, **({"n_positions": 1024} if architecture == "gpt2" else {})
    )  # it takes any length for 1,024
    path = write_gguf(tmp_path / "model.gguf", model, "Q4_1", "Q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    found = load_model(str(path))
    for name, tensor in theirs.state_dict().items():
        layer = found.get_submodule(name.rpartition(".")[0])
        own = (
            dense_weight(layer)
            if isinstance(layer, GGUFLinear) and name.endswith("weight")
            else found.state_dict()[name]
        )
        if isinstance(layer, GGUFLinear) and layer.conv1d is not None and name.endswith("weight"):
            own = own.t()
        assert torch.equal(own, tensor), name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_kept(kind, tmp_path):
    model = tiny("llama", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    path = write_gguf(tmp_path / "model.gguf", model, kind, "Q8_0", head=kind)
    found = load_model(str(path), torch.bfloat16)
    layers = [layer for layer in found.modules() if isinstance(layer, GGUFLinear)]
    assert {layer.kind for layer in layers} == {kind} and len(layers) == 15  # the head, which is its own, among them
    assert found.get_input_embeddings().weight.dtype == torch.bfloat16
    with open_gguf(path) as file:
        query, output = file.blocks("blk.0.attn_q.weight"), file.blocks("blk.0.attn_output.weight")
    attention = found.model.layers[0].self_attn
    assert torch.equal(attention.o_proj.codes, output)
    assert not torch.equal(attention.q_proj.codes, query)
    assert torch.equal(attention.q_proj.codes.unique(dim=0), query.unique(dim=0))  # the same rows in another order


def test_an_adapter_learns_on_the_blocks(tmp_path):
    found = load_model(str(write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q4_0", "Q8_0")))
    model = get_peft_model(found, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
    before = [layer.codes.clone() for layer in model.modules() if isinstance(layer, GGUFLinear)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = [layer.codes for layer in model.modules() if isinstance(layer, GGUFLinear)]
    assert all(map(torch.equal, before, after))


def test_other_blocks_become_dense_and_are_counted(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("qwen2"), "BF16")
    assert held(path) == ({}, {})
    model = tiny("qwen2", hidden_size=256)
    path = write_gguf(tmp_path / "k.gguf", model, "Q4_0")
    raw = path.read_bytes()
    name = b"blk.0.attn_output.weight"
    at = raw.index(name) + len(name) + 4 + 16
    assert raw[at : at + 4] == bytes([2, 0, 0, 0])  # Q4_0; IQ4_NL has blocks of the same size
    path.write_bytes(raw[:at] + bytes([20]) + raw[at + 1 :])
    assert held(path) == ({"Q4_0": 13}, {"IQ4_NL": 1})
    found = load_model(str(path))
    assert type(found.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert type(found.model.layers[1].self_attn.o_proj) is GGUFLinear


def test_numbers_are_packed_while_they_are_read(tmp_path):
    model = tiny("llama")
    path = write_gguf(tmp_path / "model.gguf", model, "F16")
    found = load_model(str(path), quant=QuantConfig("nf4"))
    layers = [layer for layer in found.modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 14 and type(found.lm_head) is torch.nn.Linear
    from minilora import quantize_model

    own = quantize_model(load_model(str(path)), QuantConfig("nf4"))
    assert torch.equal(logits(found), logits(own))


def test_what_is_packed_stays_as_it_is(tmp_path):
    path = str(write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q4_1"))
    assert torch.equal(logits(load_model(path, quant=QuantConfig("nf4"))), logits(load_model(path)))


def test_a_folder_with_the_file_is_the_model(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q4_1")
    found = load_model(str(tmp_path))
    assert found.config._name_or_path == str(tmp_path)
    assert torch.equal(logits(found), logits(load_model(str(tmp_path / "model.gguf"))))


def test_a_plan_counts_the_blocks(tmp_path):
    path = str(write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q4_1"))
    packed, dense = (
        sum(p.numel() * p.element_size() for p in m.parameters()) for m in (load_model(path), skeleton(path))
    )
    job = PlanJob(path, batch=1, seq=16, dtype="float32")
    assert predicted(job).parts["weights"] < dense
    assert predicted(job).loading == packed


# ---- the config


def test_llama_3_says_its_rule_by_its_factors(tmp_path):
    import transformers

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    model = tiny("llama", rope_parameters=rope | {"original_max_position_embeddings": 8192}, rope_theta=500_000.0)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(model.config).inv_freq
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / _factors(500_000.0, 16, 8.0), theirs)
    path = write_gguf(tmp_path / "model.gguf", model)
    with_factors(path, _factors(500_000.0, 16, 8.0))
    found = load_model(str(path))
    assert torch.equal(logits(found), logits(model))
    with_factors(path, 3 * _factors(500_000.0, 16, 8.0))
    with pytest.raises(
        CheckpointError, match=r"its rope_freqs.weight is none that Llama 3's rule for long texts gives"
    ):
        load_model(str(path))


def with_factors(path, factors):
    """The file again, with the factors of Llama 3's rule in it."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(other := path.with_suffix(".new"), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            writer.add_tensor(tensor.name, tensor.data.copy())
    writer.add_tensor("rope_freqs.weight", factors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.move(other, path)


def test_ends_of_turn_end_an_answer(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), tokenizer__ggml__eot_token_id=259)
    assert gguf_config_of(path).eos_token_id == [257, 259]
    assert load_model(str(path)).generation_config.eos_token_id == [257, 259]


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}
NEAR = {"rope_type": "default", "rope_theta": 900.0}
SEVEN = {"num_hidden_layers": 7, "sliding_window": 4, "intermediate_size": 32}
# Architecture, what its config has, entries of the file that are other than the converter's.
SAID = {
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "biases of attention": ("llama", {"attention_bias": True}, {}),
    "biases of the MLP": ("llama", {"mlp_bias": True, "tie_word_embeddings": True}, {}),
    **{f"stretched {kind}": (kind, {"rope_parameters": LINEAR}, {}) for kind in ("llama", "qwen2", "qwen3", "starcoder2", "gemma2")},
    "stretched in part": ("stablelm", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, {}),
    "stretched by the old name": (
        "llama",
        {"rope_parameters": LINEAR},
        {"llama__rope__scaling__type": None, "llama__rope__scaling__factor": None, "llama__rope__scale_linear": 4.0},
    ),
    "a factor of 0": ("llama", {}, {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 0.0}),
    "a factor of none": ("llama", {}, {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 8.0}),
    "Gemma 3 of 4B": ("gemma3", {**SEVEN, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": NEAR}}, {}),
    "Gemma 3 with a cap": ("gemma3", {"final_logit_softcapping": 3.0}, {}),
    "no experts": ("llama", {}, {"llama__expert_count": 0, "llama__expert_used_count": 0}),
    **{f"experts of {kind}": (kind, {}, {}) for kind in MIXTURES},
    "experts whose widths are not said": (
        "qwen2moe",
        {"intermediate_size": 64, "shared_expert_intermediate_size": 64},
        {f"qwen2moe__expert_{which}feed_forward_length": None for which in ("", "shared_")},
    ),
    "lists": ("llama", {}, {"llama__attention__head_count": [4, 4], "llama__attention__head_count_kv": [2, 2]}),
    "a list of widths": ("qwen3", {}, {"qwen3__feed_forward_length": [96, 96], "qwen3__attention__head_count_kv": [2, 2]}),
    **{
        f"as many keys {kind}": (kind, {"num_key_value_heads": 4}, {f"{kind}__attention__head_count_kv": None})
        for kind in ARCHITECTURES
        if kind != "gpt2"
    },
    "a window": ("phi3", {"sliding_window": 24}, {}),
    "a window of 0": ("phi3", {}, {"phi3__attention__sliding_window": 0}),
    "a context of old": ("phi3", {}, {"phi3__rope__scaling__original_context_length": 128}),
}  # fmt: skip
SHORT = IDS[0, :12].tolist()


@pytest.mark.parametrize("said", SAID)
def test_what_a_file_may_say_is_read_to_the_bit(said, tmp_path):
    architecture, fields, changes = SAID[said]
    model = tiny(architecture, **fields)
    found = load_model(str(write_gguf(tmp_path / "model.gguf", model, **changes)))
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_become_dense_and_are_counted(architecture, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny(architecture), "Q8_0", "Q8_0")
    assert held(path)[1] == {"Q8_0": 2 * 3}
    found = load_model(str(path))
    with open_gguf(path) as file:
        whole = torch.cat([file.values(f"blk.1.ffn_{name}_exps.weight") for name in ("gate", "up")], 1)
        assert torch.equal(found.model.layers[1].mlp.experts.gate_up_proj, whole)
        assert torch.equal(found.model.layers[1].mlp.experts.down_proj, file.values("blk.1.ffn_down_exps.weight"))


def test_experts_of_numbers_are_packed_with_the_rest(tmp_path):
    from minilora import quantize_model

    path = write_gguf(tmp_path / "model.gguf", tiny("qwen3moe"), "F16")
    found, own = (
        load_model(str(path), quant=QuantConfig("nf4")),
        quantize_model(load_model(str(path)), QuantConfig("nf4")),
    )
    assert {name: str(layer) for name, layer in found.named_modules()} == {
        name: str(layer) for name, layer in own.named_modules()
    }
    assert torch.equal(logits(found), logits(own))


def test_a_gate_of_one_row_may_be_a_vector(tmp_path, monkeypatch):
    usual = gguf_files._converted
    monkeypatch.setattr(
        gguf_files, "_converted", lambda *given: given[2][0] if "gate_inp_shexp" in given[1] else usual(*given)
    )
    path = write_gguf(tmp_path / "model.gguf", tiny("qwen2moe"))
    with open_gguf(path) as file:
        assert file.tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (64,)
    assert torch.equal(logits(load_model(str(path))), logits(tiny("qwen2moe")))


def test_an_expert_that_is_missing_is_said(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("qwen3moe"))
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up_exps", b"blk.1.ffn_up_expt"))
    with pytest.raises(
        CheckpointError, match=r"'blk.1.ffn_gate_exps.weight' has no place|'blk.1.ffn_up_expt.weight' has no place"
    ):
        load_model(str(path))


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(
            said,
            marks=()
            if said in ("all biases", "stretched llama", "Gemma 3 of 4B", "experts of qwen2moe")
            else pytest.mark.slow,
        )
        for said in SAID
    ],
)
def test_llama_cpp_says_the_same_of_it(said, tmp_path):
    pytest.importorskip("xllamacpp")
    architecture, fields, changes = SAID[said]
    path = write_gguf(tmp_path / "model.gguf", tiny(architecture, **fields), **changes)
    found = load_model(str(path))
    with serving(path) as url:
        near = (
            5e-3 if architecture in ("gemma2", "gemma3", "starcoder2") else 1e-4
        )  # whose activation is a table in fp16
        assert distance(url, found, SHORT) < near
        told = post(url, "/completion", prompt=SHORT, n_predict=8, temperature=0, return_tokens=True, ignore_eos=True)
    own = list(SHORT)
    with torch.no_grad():
        for _ in told["tokens"]:
            scores = found(torch.tensor([own])).logits[0, -1]
            scores[found.config.eos_token_id] = -torch.inf
            own.append(int(scores.argmax()))
    assert len(told["tokens"]) == 8 and told["tokens"] == own[len(SHORT) :]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "says llama.rope.scaling.type='yarn', which is not read yet"),
        ({"llama__expert_count": 8}, "says llama.expert_count=8"),
        ({"llama__attention__scale": 0.5}, "says llama.attention.scale=0.5"),
        ({"llama__rope__dimension_count": 8}, "turns 8 of the 16 numbers of a head"),
        ({"llama__attention__value_length": 32}, "keys of 16 and values of 32"),
        ({"llama__block_count": 3}, "is missing; the tensors do not fit its metadata"),
        ({"llama__block_count": 1}, "'blk.1.* has no place in a llama model"),
        ({"llama__block_count": 2**31}, "num_hidden_layers=2,147,483,648 in its config; at most 4,096"),
        ({"llama__block_count": None}, "lacks llama.block_count"),
        ({"llama__context_length": None}, "lacks llama.context_length"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"llama__block_count": "two"}, "llama.block_count='two'; wanted a whole number"),
        ({"llama__embedding_length": 32}, "is .*the model wants"),
        ({"llama__feed_forward_length": 64}, "is .*the model wants"),
        ({"llama__attention__head_count": 0}, "lacks llama.attention.head_count"),
        ({"llama__attention__head_count_kv": 3}, "wants|makes no model"),
        ({"llama__rope__freq_base": "far"}, "llama.rope.freq_base='far'; wanted a number"),
        ({"llama__rope__freq_base": float("nan")}, "llama.rope.freq_base=nan; wanted a number"),
        ({"llama__rope__freq_base": 0.0}, "llama.rope.freq_base=0.0, which is not read yet"),
        ({"llama__vocab_size": "many"}, "llama.vocab_size='many'; wanted a whole number"),
        ({"llama__attention__key_length": 16.0}, "llama.attention.key_length=16.0; wanted a whole number"),
        ({"llama__rope__scaling__type": 7}, "llama.rope.scaling.type=7; wanted a text"),
        ({"llama__rope__scaling__attn_factor": 1.5}, "says llama.rope.scaling.attn_factor=1.5"),
        (
            {"llama__attention__head_count": [4, 2]},
            r"head_count=\[4, 2\]; wanted a whole number, the same for all layers",
        ),
        ({"llama__attention__head_count": [4, 4, 4]}, "wanted a whole number, the same for all layers"),
        ({"tokenizer__ggml__eos_token_id": "last"}, "tokenizer.ggml.eos_token_id='last'; wanted a whole number"),
        ({"general__architecture": "rwkv6"}, "is of the architecture 'rwkv6'; known are gemma2, "),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, words, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q4_1")
    path = changed(path, {name.replace("__", "."): value for name, value in changes.items()})
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_heads_of_gemma_that_the_file_does_not_say_are_what_they_share(architecture, tmp_path):
    """As in llama.cpp: transformers' own default is 256, whatever the model."""
    model = tiny(architecture, head_dim=16, query_pre_attn_scalar=16)
    unsaid = {f"{architecture}__attention__{side}_length": None for side in ("key", "value")}
    path = write_gguf(tmp_path / "model.gguf", model, **unsaid)
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(path))(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_gemma_3_without_a_window_sees_the_whole_text(tmp_path):
    pytest.importorskip("xllamacpp")
    path = write_gguf(tmp_path / "model.gguf", tiny("gemma3"), gemma3__attention__sliding_window=None)
    with serving(path) as url:
        assert distance(url, load_model(str(path)), IDS[0, :12].tolist()) < 5e-3


def changed(path, entries):
    """The file again with other entries; None leaves one out."""
    reader = gguf.GGUFReader(path)
    own = {
        name: (field.contents(), field.types) for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    lists = {list: [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]}
    of = lists | {kind: [number] for kind, number in kinds.items()}
    own |= {name: None if value is None else (value, of[type(value)]) for name, value in entries.items()}
    architecture, _ = own.pop("general.architecture")
    writer = gguf.GGUFWriter(other := path.with_suffix(".new"), architecture)
    for name, found in own.items():
        if found is not None:
            value, types = found
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.move(other, path)
    return path


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q4_1")
    with open_gguf(path) as file:
        begin = file.tensors["blk.1.ffn_up.weight"].begin
    raw = bytearray(path.read_bytes())
    raw[begin + 40 : begin + 42] = torch.tensor([torch.nan]).half().view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw)
    with pytest.raises(Exception, match=r"blk.1.ffn_up.weight: a scale of its Q4_1 blocks is NaN or infinity"):
        load_model(str(path))


def test_a_file_that_is_not_there_is_said(tmp_path):
    for name in ("nowhere.gguf", str(tmp_path / "nowhere.gguf")):
        with pytest.raises(CheckpointError, match="no such file; wanted a GGUF file"):
            load_model(name)


@pytest.mark.parametrize("used", [None, 0, 5])
def test_a_file_says_how_many_of_its_experts_are_used(used, tmp_path):
    """llama.cpp ends where it does not; transformers' default would be a number of another model."""
    path = write_gguf(tmp_path / "x.gguf", tiny("qwen3moe"), **{"qwen3moe__expert_used_count": used})
    with pytest.raises(CheckpointError, match=rf"says that {used or 0} of 4 experts are used"):
        load_model(str(path))


def test_sides_that_no_tensor_has_are_refused_in_our_words(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tiny("qwen3"))
    with open_gguf(path) as file:
        file.metadata["qwen3.attention.head_count"] = 2**62
        with pytest.raises(CheckpointError, match=r"x\.gguf.*size"):
            _empty(file, torch.float32)
