"""The walker: what a config selects, and that any doubt is an error which leaves the model as it was, to the bit."""

import copy
import re

import pytest
import torch
from torch import nn

from minilora import LoraConfig, MiniLoraError, QuantConfig, QuantLinear, get_peft_model, inject, quantize_model
from minilora.errors import ConfigError, QuantizationError, StateError, TargetError
from minilora.lora.match import linear_paths, match
from minilora.lora.targets import ends_with, select
from tests.models import adapted_paths

LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def lora(targets=None, **fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets, **fields})


def trained(model):
    return sorted(path for path, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("path", "entry", "want"),
    [
        ("h.0.attn.c_proj", "c_proj", True),
        ("h.0.attn.c_proj", "attn.c_proj", True),
        ("h.0.attn.c_proj", "h.0.attn.c_proj", True),
        ("h.0.attn.c_proj", "proj", False),
        ("h.0.attn.c_proj", "tn.c_proj", False),
        ("h.0.attn.c_proj", "attn", False),
        ("h.0.attn.c_proj", "c_pro.", False),
        ("h.0.attn.c_proj", "", False),
    ],
)
def test_a_suffix_matches_whole_components(path, entry, want):
    assert ends_with(path, entry) is want


def test_selection_keeps_the_order_of_the_model():
    paths = ["b", "a.b", "a.c", "ab"]
    assert select(paths, ["c", "b"], "target_modules") == ["b", "a.b", "a.c"]
    assert select(paths, "a.*", "target_modules") == ["a.b", "a.c", "ab"]


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["mlp.c_proj", "c_attn"], ["attn.c_attn", "mlp.c_proj"]),
        (r".*\.mlp\.c_.*", ["mlp.c_fc", "mlp.c_proj"]),
        (r".*c_attn", ["attn.c_attn"]),
        (None, ["attn.c_attn"]),
        ("all-linear", GPT2),
        ("All-Linear", GPT2),
    ],
    ids=str,
)
def test_gpt2_targets(make_gpt2, targets, want):
    model = inject(make_gpt2(), lora(targets))
    assert adapted_paths(model) == [f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in want]


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("all-linear", LLAMA),
        (None, ["self_attn.q_proj", "self_attn.v_proj"]),
        (["gate_proj"], ["mlp.gate_proj"]),
        (r"model\.layers\.\d\.self_attn\.(k|o)_proj", ["self_attn.k_proj", "self_attn.o_proj"]),
    ],
    ids=str,
)
def test_llama_targets(make_llama, targets, want):
    model = inject(make_llama(), lora(targets))
    assert adapted_paths(model) == [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in want]


def test_a_regex_matches_the_full_path_only(make_gpt2):
    with pytest.raises(
        TargetError, match=r"target_modules='c_attn' is one string, so a regex for the full path.*write \['c_attn'\]"
    ):
        inject(make_gpt2(), lora("c_attn"))


def test_a_full_path_names_one_layer(make_gpt2):
    model = inject(make_gpt2(), lora(["transformer.h.1.mlp.c_fc"]))
    assert adapted_paths(model) == ["transformer.h.1.mlp.c_fc"]


def test_exclude_modules_takes_away(make_llama):
    config = lora(r".*\.(q|v)_proj", exclude_modules=["layers.0.self_attn.q_proj"])
    want = ["0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]
    assert match(make_llama(), config).targets == tuple(f"model.layers.{name}" for name in want)


def test_modules_to_save_are_trained_whole_and_beat_targets(make_mlp):
    model = make_mlp()
    base = {name: tensor.clone() for name, tensor in model.last.state_dict().items()}
    original = model.last
    inject(model, lora(["first", "last"], modules_to_save=["last"]))
    assert adapted_paths(model) == ["first"]
    assert trained(model) == ["first.lora_A", "first.lora_B", "last.bias", "last.weight"]
    assert model.last is not original and all(torch.equal(base[n], t) for n, t in model.last.state_dict().items())
    with torch.no_grad():
        model.last.weight.zero_()
    assert torch.equal(original.weight, base["weight"]), "the copy is trained, the original kept"


def test_a_saved_container_takes_its_layers_out_of_the_targets(make_gpt2):
    model = inject(make_gpt2(), lora(["c_proj"], modules_to_save=["mlp"]))
    assert adapted_paths(model) == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert "transformer.h.1.mlp.c_proj.weight" in trained(model)


def test_modules_to_save_unties_the_head(make_gpt2, ids):
    model = inject(make_gpt2(), lora(["c_attn"], modules_to_save=["lm_head"]))
    embedding = model.transformer.wte.weight.clone()
    model(input_ids=ids).logits.square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(model.transformer.wte.weight, embedding) and not torch.equal(model.lm_head.weight, embedding)


def test_every_trained_parameter_gets_a_gradient_when_saved_modules_lie_in_each_other(make_gpt2, ids):
    """Either the inner name is refused, or what it names trains; a copy that nothing calls would never learn."""
    model = make_gpt2()
    try:
        inject(model, lora(["c_attn"], modules_to_save=["mlp", "mlp.c_fc"]))
    except MiniLoraError:
        return
    model(input_ids=ids).logits.square().mean().backward()
    kept = [value for slot in model._minilora_adapters.slots.values() for value in slot.kept.values()]
    modules = [value for value in kept if isinstance(value, nn.Module)]
    assert all(p.grad is not None for module in modules for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_new_task_head_is_trained_whole(task):
    model = nn.ModuleDict({"fc": nn.Linear(6, 9), "classifier": nn.Linear(9, 3)})
    inject(model, lora("all-linear", task_type=task))
    assert trained(model) == ["classifier.bias", "classifier.weight", "fc.lora_A", "fc.lora_B"]


@pytest.mark.parametrize(
    ("bias", "want"),
    [("none", []), ("lora_only", ["mid.bias"]), ("all", ["first.bias", "last.bias", "mid.bias", "norm.bias"])],
)
def test_bias_chooses_what_trains_beside_the_factors(make_mlp, bias, want):
    model = make_mlp()
    kept = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    before = {name: parameter.clone() for name, parameter in kept.items()}
    inject(model, lora(["mid"], bias=bias))
    names = [name.replace("mid.base_layer.bias", "mid.bias") for name in trained(model)]
    assert sorted(set(names) - {"mid.lora_A", "mid.lora_B"}) == want
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert all(torch.equal(kept[name], before[name]) for name in kept), "the originals are kept"


def test_a_second_adapter_may_train_biases_of_layers_that_the_first_adapts(make_mlp):
    model, x = make_mlp(), torch.randn(3, 12)
    inject(model, lora(["first"]), "one")
    inject(model, lora(["first"], bias="lora_only"), "two")
    assert model(x).shape == (3, 5)
    assert trained(model) == ["first.base_layer.bias", "first.lora_A", "first.lora_B"]


def test_fresh_adapters_leave_the_output_alone(make_gpt2, make_llama, ids):
    for model, fields in ((make_gpt2(), {"bias": "all"}), (make_llama(), {"modules_to_save": ["lm_head"]})):
        want = model(input_ids=ids).logits
        assert torch.equal(inject(model, lora("all-linear", **fields))(input_ids=ids).logits, want)


def test_patterns_reach_the_layers(make_mlp):
    model = inject(make_mlp(), lora(["first", "last"], rank_pattern={"first": 2}, alpha_pattern={"last": 2}))
    assert (model.first.r, model.first.scaling) == (2, 6) and (model.last.r, model.last.scaling) == (4, 0.5)


def test_training_mode_of_the_model_is_kept(make_mlp):
    for mode in (True, False):
        model = inject(make_mlp().train(mode), lora("all-linear", lora_dropout=0.5))
        assert all(module.training is mode for module in model.modules())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 9), nn.Linear(9, 6)
        self.again = self.one


def shared_block():
    block = nn.Sequential(nn.Linear(6, 6))
    return nn.ModuleDict({"encoder": block, "decoder": block, "head": nn.Linear(6, 3)})


def with_rnn():
    return nn.ModuleDict({"rnn": nn.GRU(6, 9), "conv": nn.Conv2d(4, 4, 3, groups=2), "fc": nn.Linear(9, 4)})


# What is wrong, on which model, the config, the error, and the words that name the culprit and the way out.
MISTAKES = {
    "typo among several": ("gpt2", ["c_attn", "c_prjo"], {}, TargetError, "entry 'c_prjo' matches nothing.*'c_proj'"),
    "fragment": ("gpt2", ["c_attn", "proj"], {}, TargetError, "entry 'proj' matches nothing"),
    "nothing asked": ("gpt2", [], {}, ConfigError, "target_modules is empty"),
    "bad regex": ("gpt2", "(", {}, ConfigError, r"target_modules='\(' is not a regular expression"),
    "regex matches nothing": ("gpt2", r".*\.q", {}, TargetError, "matches no full path"),
    "container": ("gpt2", ["mlp"], {}, TargetError, r"transformer\.h\.0\.mlp is a GPT2MLP.*h\.0\.mlp\.c_fc'"),
    "norm": ("gpt2", ["c_attn", "ln_1"], {}, TargetError, r"h\.0\.ln_1 is a LayerNorm, which takes no adapter"),
    "embedding": ("gpt2", ["wte"], {}, TargetError, r"transformer\.wte shares its weight with lm_head; set ensure.*untie"),
    "excluded typo": ("gpt2", ["c_attn"], {"exclude_modules": ["c_atn"]}, TargetError, "exclude_modules entry 'c_atn'"),
    "all excluded": ("gpt2", ["c_attn"], {"exclude_modules": r".*"}, TargetError, "No modules were targeted.*exclude_modules"),
    "saved typo": ("gpt2", ["c_attn"], {"modules_to_save": ["haed"]}, TargetError, "modules_to_save entry 'haed'"),
    "saved beats all": ("gpt2", ["c_fc"], {"modules_to_save": ["c_fc"]}, TargetError, "No modules were targeted"),
    "no default": ("mlp", None, {}, TargetError, "target_modules=None has no default.*all-linear"),
    "shared layer": ("shared", ["one", "other"], {}, TargetError, "one and again are one shared layer"),
    "shared layer, any": ("shared", "all-linear", {}, TargetError, "one and again are one shared layer"),
    "shared block": ("block", "all-linear", {}, TargetError, r"encoder\.0 and decoder\.0 are one shared layer"),
    "recurrent": ("rnn", ["fc", "rnn"], {}, TargetError, "rnn is a GRU, which takes no adapter; wanted Linear"),
    "grouped convolution": ("rnn", ["conv"], {"r": 3}, ConfigError, "conv: r=3 on a convolution of 2 groups.*'conv': 4"),
    "start of a convolution": ("rnn", ["conv"], {"init_lora_weights": "pissa"}, TargetError, "conv is a Conv2d, which takes dora or lora"),
    "root is the layer": ("root", "all-linear", {}, TargetError, "No modules were targeted"),
    "root by name": ("root", ["weight"], {}, TargetError, "entry 'weight' matches nothing"),
    "saved layer is packed": ("packed", ["first"], {"modules_to_save": ["last"]}, MiniLoraError, "last"),
}  # fmt: skip


@pytest.fixture
def build(make_gpt2, make_mlp):
    def make(kind):
        return {
            "gpt2": make_gpt2,
            "mlp": make_mlp,
            "shared": Shared,
            "block": shared_block,
            "rnn": with_rnn,
            "root": lambda: nn.Linear(6, 9),
            "packed": lambda: quantize_model(make_mlp(), target_modules=["last"]),
        }[kind]()

    return make


@pytest.mark.parametrize("call", [inject, get_peft_model])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_changes_nothing(build, snapshot, call, mistake):
    kind, targets, fields, error, words = MISTAKES[mistake]
    model = build(kind)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call(model, lora(targets, **fields))
    assert re.search(words, str(caught.value)), str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("mistake", [name for name, row in MISTAKES.items() if row[0] == "gpt2"])
def test_a_mistake_in_a_second_adapter_leaves_the_first(make_gpt2, snapshot, randomize, ids, mistake):
    _, targets, fields, error, _ = MISTAKES[mistake]
    model = randomize(inject(make_gpt2(), lora(["c_attn"], bias="all")))
    before, logits = snapshot(model), model(input_ids=ids).logits
    with pytest.raises(error):
        inject(model, lora(targets, **fields), "second")
    assert snapshot(model) == before and torch.equal(model(input_ids=ids).logits, logits)
    assert list(model._minilora_adapters.configs) == ["default"]


def test_a_second_get_peft_model_is_refused(make_mlp, snapshot, randomize):
    model = randomize(get_peft_model(make_mlp(), lora("all-linear")))
    before = snapshot(model)
    with pytest.raises(StateError, match=r"has adapters \['default'\] already; unload\(\)"):
        get_peft_model(model, lora("all-linear"), "second")
    assert snapshot(model) == before


def test_a_taken_name_is_refused(make_mlp, snapshot):
    model = inject(make_mlp(), lora(["first"]), "fr")
    before = snapshot(model)
    with pytest.raises(StateError, match="an adapter is called 'fr' already; choose another"):
        inject(model, lora(["last"]), "fr")
    assert snapshot(model) == before


def test_a_model_inside_which_adapters_sit_is_refused(make_mlp, snapshot):
    outer = nn.ModuleDict({"inner": inject(make_mlp(), lora(["first"]))})
    before = snapshot(outer)
    with pytest.raises(StateError, match=r"inner\.first carries an adapter already"):
        inject(outer, lora(["first"]))
    assert snapshot(outer) == before


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../up", "a/b", "a\\b", "", ".", "..", "x" * 200, "a\nb", 3])
def test_a_name_that_cannot_be_a_folder_is_refused(make_mlp, snapshot, name):
    """save_pretrained makes a folder of the name: a path in it would write elsewhere."""
    model = make_mlp()
    before = snapshot(model)
    with pytest.raises(MiniLoraError):
        get_peft_model(model, lora(["first"]), name)
    assert snapshot(model) == before


def test_injecting_freezes_all_but_the_adapter(make_mlp):
    model = make_mlp()
    base = copy.deepcopy(model)
    inject(model, lora(["first"]))
    assert trained(model) == ["first.lora_A", "first.lora_B"]
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_quantize_model_replaces_all_but_the_head_in_place(make_gpt2, make_llama, ids, double):
    for make, names, head in ((make_gpt2, GPT2, "lm_head"), (make_llama, LLAMA, "lm_head")):
        model = make()
        dense = model(input_ids=ids).logits
        assert quantize_model(model, QuantConfig(double_quant=double)) is model
        packed = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
        assert len(packed) == 2 * len(names) and linear_paths(model) == packed
        assert isinstance(getattr(model, head), nn.Linear) and not model.training
        error = (model(input_ids=ids).logits - dense).norm() / dense.norm()
        assert 1e-4 < error < 0.5


@pytest.mark.parametrize(("targets", "want"), [(["c_fc"], ["mlp.c_fc"]), (r".*attn\.c_proj", ["attn.c_proj"])])
def test_quantize_model_takes_names(make_gpt2, targets, want):
    model = quantize_model(make_gpt2(), target_modules=targets)
    packed = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == [f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in want]


def damage(model, value):
    model.transformer.h[1].mlp.c_proj.weight.data[3, 4] = value


def widen(model):
    model.transformer.h[1].mlp.c_proj.double()


LAST = r"h\.1\.mlp\.c_proj\.weight"
UNQUANTIZABLE = {
    "nan in the last layer": (lambda m: damage(m, float("nan")), {}, QuantizationError, rf"{LAST} holds NaN"),
    "inf in the last layer": (lambda m: damage(m, float("inf")), {}, QuantizationError, rf"{LAST} holds NaN"),
    "float64 in the last layer": (widen, {}, QuantizationError, rf"{LAST} is torch\.float64"),
    "typo among several": (None, {"target_modules": ["c_fc", "c_fx"]}, TargetError, "'c_fx' matches nothing.*'c_fc'"),
    "norm": (None, {"target_modules": ["c_fc", "ln_1"]}, TargetError, "LayerNorm"),
    "nothing asked": (None, {"target_modules": []}, ConfigError, "target_modules is empty"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", UNQUANTIZABLE)
def test_a_mistake_in_quantizing_changes_nothing(make_gpt2, snapshot, mistake):
    spoil, arguments, error, words = UNQUANTIZABLE[mistake]
    model = make_gpt2()
    if spoil:
        spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        quantize_model(model, **arguments)
    assert snapshot(model) == before


def test_quantizing_twice(make_gpt2, snapshot):
    model = quantize_model(make_gpt2(), target_modules=["c_fc"])
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"h\.0\.mlp\.c_fc is quantized already"):
        quantize_model(model, target_modules=["c_attn", "c_fc"])
    assert snapshot(model) == before
    quantize_model(model)  # passes over what is packed
    layers = [model.get_submodule(path) for path in linear_paths(model)]
    assert len(layers) == 8 and all(isinstance(layer, QuantLinear) for layer in layers)
    before = snapshot(model)
    with pytest.raises(TargetError, match="no dense linear layer is left"):
        quantize_model(model)
    assert snapshot(model) == before


def test_quantizing_under_adapters_is_refused(make_mlp, snapshot):
    model = inject(make_mlp(), lora(["first"]))
    before = snapshot(model)
    with pytest.raises(StateError, match="quantize it first and inject then"):
        quantize_model(model)
    assert snapshot(model) == before


def test_quantizing_a_shared_layer_is_refused(snapshot):
    model = Shared()
    before = snapshot(model)
    with pytest.raises(TargetError, match="one and again are one shared layer"):
        quantize_model(model)
    assert snapshot(model) == before
