"""No run trains nothing, nothing that is not finite goes anywhere, and what fails leaves the model as it was."""

import math
import re
from unittest import mock

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, QuantConfig, inject, load_adapter, merge, quantize, quantize_model, save_adapter
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import DataError, QuantizationError, StateError
from minilora.export.folders import TARGETS, export_adapter, export_folder
from minilora.linear.layers import QuantLinear
from minilora.lora.config import LoraConfig as Config
from minilora.lora.slot import Slot
from minilora.training.guards import check_examples, check_parameters, context_length, refuse_nonfinite
from minilora.training.loop import TrainConfig, train

PAD, LAYERS = 63, ["q_proj", "up_proj"]
GOOD = [Encoded((1, 2, 3, 4), (IGNORED, 2, 3, 4)), Encoded((5, 6, 7), (IGNORED, IGNORED, 7))]


@pytest.fixture
def adapted(make_llama, randomize):
    def make(random=False, **fields):
        model = make_llama(0)
        torch.manual_seed(3)
        inject(model, LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": LAYERS} | fields)))
        return randomize(model) if random else model

    return make


def run(model, folder, data=GOOD, pad=PAD, evaluation=(), **fields):
    config = TrainConfig(**({"steps": 2, "batch_size": 2, "warmup": 0.0} | fields))
    return train(model, data, config, folder, pad, evaluation)


# ---- what would not train


def frozen(model):
    model.get_parameter("model.layers.1.self_attn.q_proj.lora_A").requires_grad_(False)


def loosened(model):
    model.get_parameter("model.norm.weight").requires_grad_(True)


def replaced(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False).requires_grad_(False)


def two_active(model):
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS), "second")
    minilora.set_adapter(model, ["default", "second"])


FAULTS = {
    "one factor frozen": (frozen, "model.layers.1.self_attn.q_proj.lora_A does not require grad"),
    "a base weight loosened": (loosened, "model.norm.weight requires grad and belongs to no active adapter"),
    "a layer replaced after": (replaced, "model.layers.1.mlp.up_proj: its adapter is not in the model any more"),
    "two adapters": (two_active, "the active adapters are ['default', 'second']; wanted one"),
    "merged": (merge, "adapters ['default'] are merged, so they would not train"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_would_not_train_or_not_be_saved_is_refused_by_name(adapted, tmp_path, name):
    model, (spoil, words) = adapted(random=True), FAULTS[name]
    spoil(model)
    with pytest.raises(StateError) as caught:
        run(model, tmp_path / "run")
    assert words in str(caught.value) and ";" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_without_an_adapter_is_refused(make_llama, tmp_path):
    with pytest.raises(StateError, match="the model has no adapter, so nothing would be saved"):
        run(make_llama(0), tmp_path)


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 2]}]
)
def test_all_that_an_adapter_trains_is_allowed_and_trains(adapted, tmp_path, fields):
    model = adapted(**fields)
    own = check_parameters(model)
    before = {name: p.detach().clone() for name, p in own.items()}
    run(model, tmp_path, steps=4, lr=0.01)
    assert {name for name, p in own.items() if not torch.equal(p, before[name])} >= {n for n in own if "lora_B" in n}


def test_an_optimizer_that_was_made_first_is_found(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["first", "last"]))
    with pytest.raises(
        StateError, match=r"first\.lora_A is not in the optimizer \(4 of 4 are not\); inject the adapter"
    ):
        check_parameters(model, optimizer)
    own = check_parameters(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    assert list(own) == ["first.lora_A", "first.lora_B", "last.lora_A", "last.lora_B"]


def test_the_active_adapter_is_what_is_trained_and_saved(make_llama, tmp_path):
    model = make_llama(0)
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS), "one")
    inject(model, LoraConfig(r=3, lora_alpha=4, target_modules=LAYERS), "two")
    run(model, tmp_path, save_every=1)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert minilora.PeftConfig.from_pretrained(folder).r == 3


def test_a_gradient_that_is_zero_everywhere_is_refused_and_leaves_nothing(adapted, tmp_path):
    model = adapted()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.0)
    with pytest.raises(StateError, match="the first gradient is zero everywhere, so nothing would train"):
        run(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_first_step_that_is_not_finite_is_refused_with_the_module(adapted, tmp_path, value):
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 4] = value
    with pytest.raises(StateError) as caught:
        run(model, tmp_path)
    assert "the first step has no finite gradient: the loss is nan in micro-batch 1; model.layers.1.mlp" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


# ---- examples


def long(count):
    return Encoded((1,) * count, (1,) * count, where="d.jsonl:7")


BAD = {
    "none": ([], PAD, "no example for training"),
    "all labels ignored": (
        [*GOOD, Encoded((1, 2), (IGNORED,) * 2)],
        PAD,
        f"training example 3: every label is {IGNORED}",
    ),
    "only the first counts": ([Encoded((1, 2), (1, IGNORED))], PAD, "training example 1: every label is -100"),
    "empty": ([Encoded((), (), where="d.jsonl:3")], PAD, "d.jsonl:3: every label is -100"),
    "id too large": (
        [*GOOD, Encoded((1, 64, 3), (IGNORED, 2, 3), where="d.jsonl:9")],
        PAD,
        "d.jsonl:9: token 2 has id 64, the embedding has rows 0 to 63; this tokenizer",
    ),
    "id negative": ([Encoded((1, 2, -1), (1, 2, 3))], PAD, "training example 1: token 3 has id -1"),
    "label too large": ([Encoded((1, 2, 3), (IGNORED, 2, 99))], PAD, "training example 1: label 2 has id 99"),
    "label negative": ([Encoded((1, 2, 3), (IGNORED, -5, 3))], PAD, "training example 1: label 1 has id -5"),
    "padding": (GOOD, 64, "pad_id=64: the embedding has 64 rows"),
    "too long": ([*GOOD, long(33)], PAD, "d.jsonl:7: 33 tokens, the model's context has 32; encode with max_length=32"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_example_that_cannot_be_used_is_refused_by_its_place(adapted, tmp_path, name):
    data, pad, words = BAD[name]
    with pytest.raises(DataError) as caught:
        run(adapted(), tmp_path / "run", data, pad)
    assert str(caught.value).startswith(words) and ";" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_evaluation_is_looked_at_too(adapted, tmp_path):
    with pytest.raises(DataError, match="evaluation example 1: every label is -100"):
        run(adapted(), tmp_path / "run", evaluation=[Encoded((1, 2), (IGNORED,) * 2)])
    assert not (tmp_path / "run").exists()


def test_an_example_as_long_as_the_context_is_used(adapted, make_gpt2, make_mlp):
    check_examples(adapted(), [long(32)], PAD)
    check_examples(make_gpt2(), [long(32)], PAD)
    assert context_length(make_gpt2()) == 32 and context_length(make_mlp()) is None


# ---- nothing that is not finite goes anywhere


@pytest.fixture
def spoilt(adapted):
    """An adapter with one bad number in B of its last layer."""

    def make(value, **fields):
        model = adapted(random=True, **fields)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.lora_B")[2, 1] = value
        return model

    return make


VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@VALUES
def test_an_adapter_that_is_not_finite_is_not_merged(spoilt, snapshot, value):
    model = spoilt(value)
    before = snapshot(model)
    with pytest.raises(
        StateError, match=r"model\.layers\.1\.mlp\.up_proj: NaNs detected in the merged weights. The adapter default"
    ):
        merge(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("what", ["copy", "bias"])
def test_a_copy_or_bias_that_is_not_finite_is_not_merged(make_mlp, snapshot, what):
    lora = {"modules_to_save": ["last"]} if what == "copy" else {"bias": "all"}
    model = inject(make_mlp(), LoraConfig(r=2, lora_alpha=4, target_modules=["first"], **lora))
    with torch.no_grad():
        (model.last.weight if what == "copy" else model.norm.bias)[0] = math.nan
    before = snapshot(model)
    with pytest.raises(
        StateError, match=r"(last|norm\.bias): NaNs detected in the merged weights. The adapter default"
    ):
        merge(model)
    assert snapshot(model) == before


@VALUES
def test_nothing_is_merged_into_a_base_that_is_not_finite(adapted, snapshot, value):
    model = adapted(random=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.base_layer.weight[1, 2] = value
    before = snapshot(model)
    with pytest.raises(StateError, match=r"model\.layers\.0\.mlp\.up_proj: its base weight holds NaN or infinity"):
        merge(model)
    assert snapshot(model) == before


@VALUES
def test_an_adapter_that_is_not_finite_is_not_saved_over_a_good_one(adapted, spoilt, tmp_path, value):
    save_adapter(adapted(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateError, match=r"holds NaN or infinity in .*model\.layers\.1\.mlp\.up_proj\.lora_B"):
        save_adapter(spoilt(value), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@VALUES
@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_that_is_not_finite_is_not_exported(spoilt, tmp_path, value, target):
    with pytest.raises(StateError, match=r"model\.layers\.1\.mlp\.up_proj: its scaled factors hold NaN or infinity"):
        export_adapter(spoilt(value), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_scale_that_overflows_is_not_exported(adapted, tmp_path):
    model = adapted(random=True)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.lora_B")[2, 1] = 3e38  # times a scaling of 2
    save_adapter(model, tmp_path / "whole")
    for export in (
        lambda out: export_adapter(model, out, "vllm"),
        lambda out: export_folder(tmp_path / "whole", out, "vllm"),
    ):
        with pytest.raises(StateError, match="its scaled factors hold NaN or infinity"):
            export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@VALUES
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_is_not_finite_is_not_quantized(make_llama, snapshot, value, double):
    model = make_llama(0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] = value
    before = snapshot(model)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        quantize_model(model, QuantConfig(double_quant=double))
    assert snapshot(model) == before


@VALUES
def test_a_model_that_is_not_finite_elsewhere_is_not_written(make_llama, tmp_path, value):
    from minilora.hf.packed import save_packed

    model = quantize_model(make_llama(0))
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = value
    with pytest.raises(
        StateError, match=r"model\.embed_tokens\.weight holds NaN or infinity, so the packed model is not"
    ):
        save_packed(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@VALUES
def test_a_merged_model_that_is_not_finite_elsewhere_is_not_written(adapted, make_llama, tmp_path, monkeypatch, value):
    from minilora.hf import merge as merging

    trained, model = adapted(random=True), make_llama(0)
    for each in (trained, model):  # the same base, or the adapter is refused for that
        each.model.norm.weight.data[5] = value
    save_adapter(trained, tmp_path / "adapter")
    monkeypatch.setattr(merging, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(merging, "load_tokenizer", lambda *_: None)
    with pytest.raises(
        StateError, match=r"model\.norm\.weight holds NaN or infinity, so the merged model is not written"
    ):
        merging.merge_to_folder("m", str(tmp_path / "adapter"), str(tmp_path / "out"), allow_other_base=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_numbers_are_finite(dtype):
    most = torch.finfo(dtype).max
    refuse_nonfinite(
        [("w", torch.full((7, 300), most, dtype=dtype)), ("codes", torch.ones(3, dtype=torch.uint8))], "it"
    )


# ---- what fails leaves the model as it was


class Broke(Exception):
    pass


def failing_at(call, real):
    """``real``, but for its ``call``-th call, which raises; before it and after it it works."""
    calls = []

    def once(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Broke
        return real(*arguments, **options)

    return once, calls


def calls_of(work, where, name):
    """How often ``where.name`` is called while ``work()`` runs through."""
    real = getattr(where, name)
    once, calls = failing_at(0, real)
    with mock.patch.object(where, name, lambda *a, **o: once(*a, **o)):
        work()
    return len(calls)


def every_failure(make, work, where, name, snapshot):
    """Fail ``where.name`` at each of its calls in ``work(model)``; returns how many there are."""
    fresh = make()
    count = calls_of(lambda: work(fresh), where, name)
    real = getattr(where, name)
    for call in range(1, count + 1):
        model = make()
        before = snapshot(model)
        once, _ = failing_at(call, real)
        with mock.patch.object(where, name, lambda *a, once=once, **o: once(*a, **o)), pytest.raises(Broke):
            work(model)
        assert snapshot(model) == before, f"call {call} of {count}"
        work(model)  # and nothing stands in the way of doing it again
    return count


LORAS = {
    "plain": {"target_modules": ["first", "mid", "last"]},
    "with copies": {"target_modules": ["first", "mid"], "modules_to_save": ["last"], "bias": "all"},
    "pissa": {"target_modules": ["first", "last"], "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("place", [(Slot, "show"), (nn.Parameter, "requires_grad_")], ids=["show", "requires_grad_"])
def test_a_failed_inject_leaves_the_model_as_it_was(make_mlp, snapshot, name, second, place):
    def make():
        model = make_mlp()
        model.norm.weight.requires_grad_(False)
        return inject(model, LoraConfig(r=2, lora_alpha=4, **LORAS[name])) if second else model

    def work(model):
        inject(model, LoraConfig(r=2, lora_alpha=4, **LORAS[name]), "new")

    if place[0] is Slot:
        assert every_failure(make, work, *place, snapshot) >= 2
    else:
        assert every_failure(make, work, minilora.lora.slots.Adapters, "activate", snapshot) >= 1


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_an_adapter_that_cannot_be_made_leaves_the_model_as_it_was(make_mlp, snapshot, second):
    config = Config(r=2, lora_alpha=4, target_modules=["first", "mid", "last"])

    def make():
        return inject(make_mlp(), config) if second else make_mlp()

    assert every_failure(make, lambda m: inject(m, config, "new"), minilora.LoRALinear, "__init__", snapshot) == 3


@pytest.mark.parametrize("quant", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("requantize", [False, True])
def test_a_failed_merge_leaves_the_model_as_it_was(adapted, make_llama, randomize, snapshot, quant, requantize):
    def make():
        model = make_llama(0)
        if quant:
            quantize_model(model)
        return randomize(inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS)))

    def work(model):
        merge(model, requantize=requantize)

    from minilora.many import merging

    assert every_failure(make, work, merging, "_merged_layer", snapshot) == 4
    assert every_failure(make, work, Slot, "show", snapshot) >= 4
    assert every_failure(make, work, merging, "with_weight", snapshot) == 4


def test_a_failed_quantize_model_leaves_the_model_as_it_was(make_llama, snapshot):
    module = __import__("sys").modules["minilora.linear.packed"]
    assert every_failure(lambda: make_llama(0), quantize_model, module, "quantize", snapshot) == 14
    assert every_failure(lambda: make_llama(0), quantize_model, QuantLinear, "train", snapshot) == 14


# ---- a tensor of its own kind among packed ones


def test_a_model_with_an_outlier_is_packed_saved_and_read_again(make_llama, tmp_path, ids):
    from minilora.hf.packed import load_packed, save_packed

    model = make_llama(0)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 5] = 300.0
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: a scale is .* stay in fp32"):
        quantize_model(model, QuantConfig(double_quant=True))
    doubles = [module.double_quant for module in model.modules() if isinstance(module, QuantLinear)]
    assert doubles.count(False) == 1 and len(doubles) == 14 and not doubles[0]
    save_packed(model, tmp_path / "packed")
    said = (tmp_path / "packed" / "config.json").read_text()
    assert re.search(r'"bnb_4bit_use_double_quant": true', said)
    again = load_packed(str(tmp_path / "packed"), torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_opens_it_too(make_llama, tmp_path, ids):
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    from minilora.hf.packed import save_packed

    model = make_llama(0, intermediate_size=128)  # bitsandbytes reads other widths wrongly on a CPU
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 5] = 300.0
    with pytest.warns(UserWarning, match="stay in fp32"):
        quantize_model(model, QuantConfig(double_quant=True))
    save_packed(model, tmp_path / "packed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).train()
    layer = theirs.model.layers[0].self_attn.q_proj
    assert not layer.weight.quant_state.nested and theirs.model.layers[1].mlp.up_proj.weight.quant_state.nested
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("times", [3, 20])
def test_what_is_no_outlier_is_packed_as_bitsandbytes_packs_it(times):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[5, 7] = 0.06 * times
    ours = quantize(weight, QuantConfig(double_quant=True))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed.flatten(), codes.flatten()) and torch.equal(ours.absmax, state.absmax)


def test_a_run_on_a_loaded_adapter_is_a_run(adapted, make_llama, tmp_path):
    save_adapter(adapted(random=True), tmp_path / "first")
    model = make_llama(0)
    load_adapter(model, tmp_path / "first", is_trainable=True)
    assert len(run(model, tmp_path / "second")) == 2
