"""Adapter folders: what was saved comes back to the bit, and every fault is named and leaves the model as it was."""

import json
import os
import signal

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from minilora import LoraConfig, MiniLoraError, PeftModel, QuantConfig, get_peft_model, inject, quantize_model
from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.lora.architectures import DEFAULT_TARGETS
from minilora.lora.slot import own_parameters
from minilora.store import load as checkpoint
from minilora.store.adapter_files import SEAL_FILE, not_finite, read_adapter, read_config
from minilora.store.load import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoadReport,
    adapter_state_dict,
    fill_adapter,
    load_adapter,
    restore_adapter,
    save_adapter,
    saved_config,
)
from tests.compare import same

A0 = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
C0 = A0.replace("lora_A", "lora_C")
B1 = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"


def lora(targets=("c_attn", "mlp.c_proj"), **fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": targets, **fields})


def tensors_of(folder):
    return safetensors.torch.load_file(folder / WEIGHTS_FILE)


def config_of(folder):
    return json.loads((folder / CONFIG_FILE).read_text())


ROUND_TRIPS = {
    "conv1d": ("make_gpt2", None, {}),
    "linear": ("make_llama", None, {"target_modules": "all-linear"}),
    "regex": ("make_llama", None, {"target_modules": r".*\.1\..*(q|up)_proj"}),
    "default targets": ("make_llama", None, {"target_modules": None}),
    "patterns": ("make_gpt2", None, {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {r"0\..*": 5}}),
    "rslora": ("make_gpt2", None, {"use_rslora": True}),
    "all biases": ("make_gpt2", None, {"bias": "all"}),
    "own biases": ("make_gpt2", None, {"bias": "lora_only"}),
    "saved modules": ("make_gpt2", None, {"modules_to_save": ["ln_f", "lm_head", "h.0.mlp.c_fc"]}),
    "packed": ("make_llama", QuantConfig(), {"target_modules": "all-linear"}),
    "packed twice": ("make_gpt2", QuantConfig(double_quant=True), {"bias": "all", "modules_to_save": ["lm_head"]}),
    "excluded": ("make_gpt2", None, {"exclude_modules": ["h.0.attn.c_attn"]}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip_is_bitwise(request, randomize, ids, tmp_path, case):
    make, quantization, fields = ROUND_TRIPS[case]
    make = request.getfixturevalue(make)

    def base():
        return quantize_model(make(), quantization) if quantization else make()

    model = randomize(inject(base(), lora(**{"target_modules": ["c_attn", "mlp.c_proj"], **fields})))
    save_adapter(model, tmp_path)
    want = model(input_ids=ids).logits
    assert not torch.equal(want, base()(input_ids=ids).logits)
    loaded = base()
    load_adapter(loaded, tmp_path)
    assert same(adapter_state_dict(loaded), adapter_state_dict(model))
    assert same(tensors_of(tmp_path), adapter_state_dict(model))
    assert torch.equal(loaded(input_ids=ids).logits, want)
    save_adapter(loaded, tmp_path / "again")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_file_holds_the_adapter_and_no_base_weight(make_gpt2, randomize, tmp_path):
    model = randomize(inject(make_gpt2(), lora(["c_attn"], bias="lora_only", modules_to_save=["lm_head"])))
    save_adapter(model, tmp_path)
    layers = [f"base_model.model.transformer.h.{layer}.attn.c_attn" for layer in (0, 1)]
    names = ("lora_A.weight", "lora_B.weight", "base_layer.bias")
    want = {f"{layer}.{name}" for layer in layers for name in names} | {"base_model.model.lm_head.weight"}
    assert tensors_of(tmp_path).keys() == want
    with safetensors.safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert tensors_of(tmp_path)[A0].shape == (3, 16) and tensors_of(tmp_path)[B1].shape == (48, 3)


def test_config_file_says_what_the_model_decided(make_gpt2, make_llama, tmp_path):
    assert saved_config(inject(make_gpt2(), lora(None)))["target_modules"] == ["c_attn"]
    assert saved_config(inject(make_gpt2(), lora(None)))["fan_in_fan_out"] is True
    llama = saved_config(inject(make_llama(), lora("all-linear")))
    assert llama["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert llama["fan_in_fan_out"] is False and llama["base_model_name_or_path"] is None
    model = make_gpt2()
    model.config._name_or_path = "org/tiny"
    save_adapter(inject(model, lora()), tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text()
    assert config_of(tmp_path)["base_model_name_or_path"] == "org/tiny"
    assert text == json.dumps(config_of(tmp_path), indent=2, sort_keys=True) + "\n"


def test_written_targets_never_mean_more_than_was_adapted(tmp_path):
    """Last names alone would also match the head and the norm called alike."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(4, 6)}), "b": nn.ModuleDict({"fc": nn.LayerNorm(6)})})
    inject(model, lora("all-linear"))
    assert saved_config(model)["target_modules"] == ["a.fc"]


def test_merged_or_disabled_adapters_save_the_same(make_gpt2, randomize, tmp_path):
    model = randomize(get_peft_model(make_gpt2(), lora()))
    save_adapter(model, tmp_path / "plain")
    model.merge_adapter()
    save_adapter(model, tmp_path / "merged")
    model.unmerge_adapter()
    with model.disable_adapter():
        save_adapter(model, tmp_path / "disabled")
    want = tensors_of(tmp_path / "plain")
    for name in ("merged", "disabled"):
        assert same(tensors_of(tmp_path / name), want) and config_of(tmp_path / name) == config_of(tmp_path / "plain")


def test_saving_inside_disabled_leaves_it_disabled(make_gpt2, randomize, ids, tmp_path):
    model = randomize(get_peft_model(make_gpt2(), lora()))
    with model.disable_adapter():
        model.save_pretrained(tmp_path)
        assert torch.equal(model(input_ids=ids).logits, make_gpt2()(input_ids=ids).logits)


def test_named_adapters_go_into_folders_of_their_name(make_gpt2, randomize, ids, tmp_path):
    model = randomize(get_peft_model(make_gpt2(), lora()), 1)
    randomize(inject(model, lora(["c_fc"], r=2), "fr"), 2)
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert tensors_of(tmp_path)[A0].shape == (3, 16)
    assert torch.equal(PeftModel.from_pretrained(make_gpt2(), tmp_path / "fr", "fr")(input_ids=ids).logits, want)
    model.save_pretrained(tmp_path / "one", selected_adapters=["fr"])
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", "fr"]
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_loading_a_second_adapter_beside_the_first(make_gpt2, randomize, ids, tmp_path):
    other = randomize(inject(make_gpt2(), lora()), 3)
    save_adapter(other, tmp_path)
    model = randomize(inject(make_gpt2(), lora(["c_fc"])), 4)
    load_adapter(model, tmp_path, "other")
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_load_as_fp32(make_gpt2, randomize, tmp_path, dtype):
    save_adapter(randomize(inject(make_gpt2(), lora())), tmp_path)
    (tmp_path / SEAL_FILE).unlink()
    halves = {key: tensor.to(dtype) for key, tensor in tensors_of(tmp_path).items()}
    safetensors.torch.save_file(halves, tmp_path / WEIGHTS_FILE)
    model = make_gpt2()
    load_adapter(model, tmp_path)
    loaded = adapter_state_dict(model)
    assert same(loaded, {key: tensor.float() for key, tensor in halves.items()})


def test_a_regex_finds_the_layers_of_a_variant_with_names_of_its_own(make_llama, randomize, tmp_path, ids):
    """VeRA's tensors are not called lora: the layers must be found by what the variant saves."""
    model = randomize(inject(make_llama(), lora(r".*\.(q|v)_proj"), variant="vera"))
    save_adapter(model, tmp_path)
    again = make_llama()
    load_adapter(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_module_with_counters_comes_back_whole(tmp_path, randomize):
    """BatchNorm keeps an int64 counter among its state: a copy that is saved has to load again."""

    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6)})

    model = randomize(inject(base(), lora(["fc"], modules_to_save=["norm"])))
    model.train()["norm"](torch.randn(8, 6))
    save_adapter(model, tmp_path)
    loaded = base()
    load_adapter(loaded, tmp_path)
    assert same(loaded["norm"].state_dict(), model["norm"].state_dict())


# What happens to the folder, the base that it is loaded into, the error, and the words that name file, key and way out.


def edit_config(**changes):
    def change(folder):
        content = {key: value for key, value in (config_of(folder) | changes).items() if value is not ...}
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return change


def edit_tensors(change):
    def edit(folder):
        tensors = tensors_of(folder)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names):
    def drop(folder):
        for name in names:
            (folder / name).unlink()

    return drop


def cut(name, keep):
    def shorten(folder):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: keep if keep > 0 else len(raw) + keep])

    return shorten


def pad(folder):
    raw = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(raw + bytes(4))


def to_pickle(folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def rename_keys(old, new):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit_tensors(rename)


def put(key, value):
    return edit_tensors(lambda tensors: tensors.update({key: value(tensors[A0])}))


def poison(value):
    def change(tensors):
        tensors[B1][5, 1] = value

    return edit_tensors(change)


def no_folder(folder):
    remove(CONFIG_FILE, WEIGHTS_FILE)(folder)
    folder.rmdir()


WEIGHTS, CONFIG = WEIGHTS_FILE.replace(".", r"\."), CONFIG_FILE.replace(".", r"\.")
LAYER0 = "h.0.attn.c_attn"
FAULTS = {
    "no folder": (no_folder, CheckpointError, rf"adapter: no such folder; wanted one with {CONFIG} and {WEIGHTS}"),
    "no config": (remove(CONFIG_FILE), CheckpointError, rf"{CONFIG}: the adapter's config cannot be read"),
    "no weights": (remove(WEIGHTS_FILE), CheckpointError, rf"{WEIGHTS}: the adapter's weights cannot be read"),
    "pickle only": (to_pickle, CheckpointError, r"adapter_model\.bin: a pickle file .*save_pretrained it again"),
    "empty config": (write(CONFIG_FILE, b""), CheckpointError, rf"{CONFIG}: not JSON"),
    "cut config": (cut(CONFIG_FILE, 40), CheckpointError, rf"{CONFIG}: not JSON"),
    "config not UTF-8": (write(CONFIG_FILE, b'{"r": "\xff"}'), CheckpointError, rf"{CONFIG}: not JSON"),
    "config is a list": (
        write(CONFIG_FILE, b"[1]"),
        CheckpointError,
        rf"{CONFIG}: not JSON .*holds a list; wanted an object",
    ),
    "config is null": (write(CONFIG_FILE, b"null"), CheckpointError, rf"{CONFIG}: not JSON .*holds a NoneType"),
    "other method": (edit_config(peft_type="IA3"), ConfigError, rf"{CONFIG}: peft_type='IA3'"),
    "feature of PEFT": (edit_config(use_qalora=True), ConfigError, rf"{CONFIG}: use_qalora=True"),
    "bogus type": (edit_config(r="3"), ConfigError, rf"{CONFIG}: r='3'"),
    "alpha not a number": (edit_config(lora_alpha=float("nan")), ConfigError, rf"{CONFIG}: lora_alpha=nan"),
    "empty weights": (write(WEIGHTS_FILE, b""), CheckpointError, rf"{WEIGHTS}: damaged safetensors file of 0 bytes"),
    "garbage weights": (write(WEIGHTS_FILE, b"\x07" * 900), CheckpointError, rf"{WEIGHTS}: damaged .* of 900 bytes"),
    "weights cut in the header": (cut(WEIGHTS_FILE, 60), CheckpointError, rf"{WEIGHTS}: damaged .* of 60 bytes"),
    "weights cut at the end": (cut(WEIGHTS_FILE, -1), CheckpointError, rf"{WEIGHTS}: damaged"),
    "weights padded": (pad, CheckpointError, rf"{WEIGHTS}: damaged"),
    "no tensor": (edit_tensors(dict.clear), CheckpointError, rf"{WEIGHTS}: holds no tensor"),
    "nan": (poison(float("nan")), CheckpointError, rf"{WEIGHTS}: {B1} holds NaN or infinity"),
    "inf": (poison(float("-inf")), CheckpointError, rf"{WEIGHTS}: {B1} holds NaN or infinity"),
    "int tensor": (put(A0, torch.Tensor.int), CheckpointError, rf"{WEIGHTS}: {A0} is torch\.int32; wanted float32"),
    "bool tensor": (put(A0, torch.Tensor.bool), CheckpointError, rf"{WEIGHTS}: {A0} is torch\.bool; wanted float32"),
    "fp64 tensor": (put(A0, torch.Tensor.double), CheckpointError, rf"{WEIGHTS}: {A0} is torch\.float64"),
    "missing key": (edit_tensors(lambda t: t.pop(B1)), CheckpointError, rf"{WEIGHTS}: {B1} is missing, "),
    "unexpected key": (put(C0, torch.Tensor.clone), CheckpointError, rf"{WEIGHTS}: {C0} is unexpected"),
    "other rank": (edit_config(r=5), CheckpointError, rf"{WEIGHTS}: .*lora_[AB]\.weight is .*\b3\b.* want .*\b5\b"),
    "turned factor": (
        put(A0, lambda a: a.t().contiguous()),
        CheckpointError,
        rf"{WEIGHTS}: size mismatch: {A0} is \[16, 3\]",
    ),
    "foreign prefix": (rename_keys("base_model.", "unet."), CheckpointError, rf"{WEIGHTS}: tensor 'unet\."),
    "other layer names": (rename_keys("attn.c_attn", "attn.qkv"), CheckpointError, rf"{WEIGHTS}: .*{A0}.* missing"),
    "adapter name in keys": (rename_keys(".weight", ".default.weight"), CheckpointError, rf"{A0}.* missing"),
    "config asks for more": (edit_config(target_modules=["c_attn", "c_fc"]), CheckpointError, r": .*c_fc.*missing"),
    "config asks for less": (edit_config(target_modules=[LAYER0]), CheckpointError, rf"{B1} are unexpected.*too short"),
    "config asks for biases": (edit_config(bias="lora_only"), CheckpointError, r"c_attn\.base_layer\.bias.* missing"),
}


@pytest.fixture
def folder(make_gpt2, randomize, tmp_path):
    """A saved adapter without its seal, as another program leaves one: what the seal finds is in test_seal.py."""
    save_adapter(randomize(inject(make_gpt2(), lora(["c_attn"]))), tmp_path / "adapter")
    (tmp_path / "adapter" / SEAL_FILE).unlink()
    return tmp_path / "adapter"


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained], ids=["load_adapter", "from_pretrained"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_changes_nothing(folder, make_gpt2, snapshot, fault, load):
    spoil, error, words = FAULTS[fault]
    spoil(folder)
    model = make_gpt2()
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        load(model, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("fault", ["nan", "missing key", "other rank", "bogus type"])
def test_a_faulty_second_adapter_leaves_the_first(folder, make_gpt2, randomize, snapshot, ids, fault):
    FAULTS[fault][0](folder)
    model = randomize(inject(make_gpt2(), lora(["c_attn", "c_fc"])))
    before, want = snapshot(model), model(input_ids=ids).logits
    with pytest.raises(MiniLoraError):
        load_adapter(model, folder, "second")
    assert snapshot(model) == before and torch.equal(model(input_ids=ids).logits, want)
    assert list(model._minilora_adapters.configs) == ["default"]


OTHER_BASES = {
    "fewer layers": ({"n_layer": 1}, r"h\.1\.attn\.c_attn.* unexpected on this model"),
    "more layers": ({"n_layer": 3}, r"h\.2\.attn\.c_attn.* missing, which the config asks for"),
    "other width": ({"n_embd": 24}, r"c_attn\.lora_[AB]\.weight is .*\b(16|48)\b.* want .*\b(24|72)\b"),
}


@pytest.mark.parametrize("base", OTHER_BASES)
def test_another_base_is_refused(folder, make_gpt2, snapshot, base):
    fields, words = OTHER_BASES[base]
    model = make_gpt2(**fields)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: .*{words}.*wrong base model"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_another_architecture_is_refused(folder, make_llama, snapshot):
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(MiniLoraError, match="'c_attn' matches nothing"):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_loading_under_a_taken_name_or_onto_a_peft_model(folder, make_gpt2, snapshot):
    model = get_peft_model(make_gpt2(), lora(["c_fc"]))
    before = snapshot(model)
    with pytest.raises(StateError, match="an adapter is called 'default' already"):
        load_adapter(model, folder)
    with pytest.raises(StateError, match=r"has adapters \['default'\] already"):
        PeftModel.from_pretrained(model, folder, "other", config=lora(["c_fc"]))
    assert snapshot(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_not_saved_over_a_good_one(folder, make_gpt2, randomize, value):
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = randomize(inject(make_gpt2(), lora(["c_attn"])))
    model.transformer.h[1].attn.c_attn.lora_B.data[5, 1] = value
    with pytest.raises(StateError, match=f"adapter 'default' holds NaN or infinity in {B1}"):
        save_adapter(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == good


def test_saving_an_unknown_adapter(make_gpt2, tmp_path):
    with pytest.raises(StateError, match="no adapter is called 'fr'; there are 'default'"):
        save_adapter(inject(make_gpt2(), lora()), tmp_path / "new", "fr")
    assert not (tmp_path / "new").exists()


EXPONENTIAL = r"(([a-z0-9_.])+)+!"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": EXPONENTIAL},
        {"exclude_modules": EXPONENTIAL},
        {"rank_pattern": {EXPONENTIAL: 2}},
        {"alpha_pattern": {EXPONENTIAL: 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that can interrupt a regular expression")
def test_a_pattern_in_a_file_cannot_hang_the_load(folder, make_gpt2, changes):
    edit_config(**changes)(folder)

    def stop(*_):
        raise TimeoutError("the pattern of the file was run")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        load_adapter(make_gpt2(), folder)
    except MiniLoraError:
        pass  # refusing such a file is fine too
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- what goes into a model, and what is left out


def test_the_config_of_a_folder_can_be_read_alone(folder):
    edit_config(lora_alpha=14, a_key_of_tomorrow=1)(folder)
    with pytest.warns(UserWarning, match=rf"keyword arguments \['a_key_of_tomorrow'\] .*{CONFIG} has them"):
        assert read_config(folder).lora_alpha == 14
    remove(CONFIG_FILE)(folder)
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: the adapter's config cannot be read"):
        read_config(folder)


def test_a_warning_of_unknown_keys_stays_short(folder):
    edit_config(**{f"{at}{'x' * 100}": 1 for at in range(12)})(folder)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments \\['0xx") as caught:
        read_config(folder)
    assert len(str(caught[0].message)) < len(str(folder)) + 8 * 64 + 150


def test_without_strict_what_fits_is_loaded_and_the_rest_listed(folder, make_gpt2):
    """One key missing, one too many, one of another shape; four tensors in all."""

    def change(tensors):
        del tensors[A0]
        tensors[C0] = torch.ones(2)
        tensors[B1] = torch.ones(48, 2)

    edit_tensors(change)(folder)
    model = make_gpt2()
    report = load_adapter(model, folder, strict=False)
    assert (report.missing_keys, report.unexpected_keys, report.mismatched_keys) == ([A0], [C0], [B1])
    loaded, file = adapter_state_dict(model), tensors_of(folder)
    assert {key for key in file.keys() & loaded.keys() if torch.equal(loaded[key], file[key])} == {
        A0.replace("h.0", "h.1"),
        B1.replace("h.1", "h.0"),
    }
    assert not loaded[B1].any()


def test_messages_name_three_tensors_and_count_the_others(folder, make_gpt2):
    edit_config(target_modules=["c_attn", "c_fc"])(folder)
    with pytest.raises(
        CheckpointError, match=r"(\S+c_fc\.lora_\w\.weight, ){2}\S+c_fc\.lora_\w\.weight and 1 more are missing"
    ):
        load_adapter(make_gpt2(), folder)
    edit_config(target_modules=["h.0.attn.c_attn"])(folder)
    with pytest.raises(CheckpointError, match=r": \S+lora_A\.weight, \S+lora_B\.weight are unexpected"):
        load_adapter(make_gpt2(), folder)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("activate", [False, True])
def test_what_is_loaded_trains_and_is_active_as_told(folder, make_gpt2, trainable, activate):
    model = inject(make_gpt2(), lora(["c_fc"]), "first")
    load_adapter(model, folder, "second", is_trainable=trainable, activate=activate)
    record = model._minilora_adapters
    assert record.active == (("second",) if activate else ("first",))
    trains = [p.requires_grad for value in record.named("second").values() for p in own_parameters(value)]
    assert len(trains) == 4 and set(trains) == {trainable and activate}


def test_restoring_brings_the_values_back_and_changes_nothing_else(make_gpt2, randomize, tmp_path):
    model = randomize(inject(make_gpt2(), lora(bias="lora_only", modules_to_save=["ln_f"])), 1)
    save_adapter(model, tmp_path)
    want = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    objects = [(path, id(value), value.requires_grad) for path, value in model.named_parameters()]
    randomize(model, 2)
    assert not same(adapter_state_dict(model), want)
    restore_adapter(model, tmp_path)
    assert same(adapter_state_dict(model), want)
    assert [(path, id(value), value.requires_grad) for path, value in model.named_parameters()] == objects


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        (
            {"lora_alpha": 13},
            None,
            r"c_attn has \(r, lora_alpha, rslora\) = \(3, 12, False\) as lora, the adapter \(3, 13, False\)",
        ),
        ({"use_rslora": True}, None, r"= \(3, 12, False\) as lora, the adapter \(3, 12, True\) as lora"),
        ({"alpha_pattern": {"c_attn": 6}}, None, r"the adapter \(3, 6, False\)"),
        ({"r": 4}, None, r"the adapter \(4, 12, False\)"),
        ({}, "rotated", r"= \(3, 12, False\) as lora, the adapter \(3, 12, False\) as rotated"),
    ],
    ids=str,
)
def test_restoring_into_an_adapter_of_another_scale_is_refused(folder, make_gpt2, snapshot, fields, kind, words):
    model = inject(make_gpt2(), lora(["c_attn"], **fields))
    if kind:
        model._minilora_adapters.variants["default"] = kind
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=f"{words}.*resume with the config that it was saved with"):
        restore_adapter(model, folder)
    assert snapshot(model) == before


def test_filling_takes_tensors_by_their_file_names(folder, make_gpt2):
    model, tensors = inject(make_gpt2(), lora(["c_attn"])), tensors_of(folder)
    report = fill_adapter(model, tensors)
    assert same(adapter_state_dict(model), tensors) and report == LoadReport([], [], [])
    with pytest.raises(CheckpointError, match=rf"^state dict: {B1} is missing"):
        fill_adapter(model, {key: tensor for key, tensor in tensors.items() if key != B1})
    assert fill_adapter(model, {A0: tensors[A0]}, strict=False).missing_keys == sorted(tensors.keys() - {A0})


@pytest.mark.parametrize("r", [16, 100])
def test_a_rank_beyond_the_file_is_refused_before_it_is_allocated(folder, make_gpt2, monkeypatch, r):
    """16 is a side of some tensor in the file, so the shapes have to say it; 100 is none."""
    monkeypatch.setattr(checkpoint, "_MODEST", 0)
    load_adapter(make_gpt2(), folder)
    edit_config(r=r)(folder)
    words = (
        r"size mismatch: .*lora_A\.weight is \[3, 16\], config and model want \[16, 16\]"
        if r == 16
        else f"the config says r={r} for .*c_attn, and"
    )
    with pytest.raises(CheckpointError, match=words):
        load_adapter(make_gpt2(), folder)


def test_a_modest_rank_is_left_to_the_shapes(folder, make_gpt2, monkeypatch):
    edit_config(r=100)(folder)
    numbers = sum(tensor.numel() for tensor in tensors_of(folder).values())
    wanted = 100 * (16 + 48) * 2
    monkeypatch.setattr(checkpoint, "_MODEST", wanted - 2 * numbers)
    with pytest.raises(CheckpointError, match="config and model want"):
        load_adapter(make_gpt2(), folder)
    monkeypatch.setattr(checkpoint, "_MODEST", wanted - 2 * numbers - 1)
    with pytest.raises(CheckpointError, match="no tensor of the file has that rank"):
        load_adapter(make_gpt2(), folder)


EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embedding_that_peft_saves_along_comes_with_the_adapter(make_llama, randomize, tmp_path, dtype, ids):
    def base():
        return make_llama().to(dtype)

    config = lora(["embed_tokens", "q_proj"])
    model = randomize(inject(base(), config))
    save_adapter(model, tmp_path, save_embedding_layers=False)
    (tmp_path / SEAL_FILE).unlink()
    plain = tensors_of(tmp_path)
    own = base().model.embed_tokens.weight.detach()
    for target in (base(), inject(base(), lora(["v_proj"]))):
        safetensors.torch.save_file(plain | {EMBEDDING: own.float()}, tmp_path / WEIGHTS_FILE)
        report = load_adapter(target, tmp_path, "second")
        assert report.unexpected_keys == [] and same(adapter_state_dict(target, "second"), plain)
    other = own.clone()
    other[5, 3] += 1
    safetensors.torch.save_file(plain | {EMBEDDING: other}, tmp_path / WEIGHTS_FILE)
    again = base()
    load_adapter(again, tmp_path)
    assert torch.equal(again.model.embed_tokens.base_layer.weight, other)
    model.model.embed_tokens.base_layer.weight.data[5, 3] += 1
    assert torch.equal(again(ids).logits, model(ids).logits)
    shared = inject(base(), lora(["v_proj"]))
    with pytest.raises(
        CheckpointError, match=f"{EMBEDDING}: the file brings another base weight .*other adapters stand"
    ):
        load_adapter(shared, tmp_path, "second")
    assert torch.equal(shared.model.embed_tokens.weight, own)
    safetensors.torch.save_file(plain | {EMBEDDING: own[:-1].clone()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}: the file brings another base weight"):
        load_adapter(base(), tmp_path)
    nowhere = EMBEDDING.replace("embed_tokens", "nowhere")
    safetensors.torch.save_file(plain | {nowhere: own}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"{nowhere}: the file brings another base weight"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "q_proj"])
def test_a_grown_vocabulary_comes_with_the_adapter(make_llama, randomize, tmp_path, target, tied):
    """New rows are drawn anew with every start; the file brings those that the adapter was trained on."""
    make_llama().save_pretrained(tmp_path / "base")

    def grown(seed):
        model = make_llama(tie_word_embeddings=tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        model.model.embed_tokens.weight.data[64:].normal_()
        return model

    fields = {"base_model_name_or_path": str(tmp_path / "base"), "ensure_weight_tying": tied}
    model = randomize(inject(grown(1), lora([target], **fields)))
    save_adapter(model, tmp_path / "adapter")
    again, ids = grown(2), torch.arange(60, 70)[None]
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)
    save_adapter(model, tmp_path / "small", save_embedding_layers=False)
    small = tensors_of(tmp_path / "small")
    assert small.keys() < tensors_of(tmp_path / "adapter").keys() and not any(
        t.shape == (70, 64) for t in small.values()
    )
    with pytest.raises(ConfigError, match="save_embedding_layers='all'"):
        save_adapter(model, tmp_path / "small", save_embedding_layers="all")


def test_only_a_base_weight_may_come_along(make_llama, randomize, tmp_path):
    save_adapter(randomize(inject(make_llama(), lora(["embed_tokens"]))), tmp_path)
    (tmp_path / SEAL_FILE).unlink()
    key = EMBEDDING.replace("weight", "bias")
    safetensors.torch.save_file(tensors_of(tmp_path) | {key: torch.ones(64)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"{key} is unexpected"):
        load_adapter(make_llama(), tmp_path)


def test_a_model_that_has_no_tokens_is_saved_and_loaded(make_mlp, randomize, tmp_path):
    """Of sound or images, say: transformers raises where such a one is asked for its embeddings."""

    def build():
        model = make_mlp()
        model.get_input_embeddings = model.get_output_embeddings = none
        return model

    def none():
        raise NotImplementedError("`get_input_embeddings` not auto-handled")

    model = randomize(inject(build(), lora(["first"])))
    save_adapter(model, tmp_path)
    again = build()
    load_adapter(again, tmp_path)
    x = torch.randn(6, 12)
    assert torch.equal(again(x), model(x))


def test_two_names_of_one_tied_factor_must_agree(make_gpt2, randomize, tmp_path, ids):
    """A head that is tied to the embedding sees its factors turned round; both are in the file."""
    model = randomize(inject(make_gpt2(), lora(["wte"], ensure_weight_tying=True)))
    tensors = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    head = next(key for key in sorted(tensors) if "lm_head" in key)
    again = inject(make_gpt2(), lora(["wte"], ensure_weight_tying=True))
    fill_adapter(again, tensors)
    assert torch.equal(again(ids).logits, model(ids).logits)
    tensors[head] = tensors[head] + 1
    with pytest.raises(CheckpointError, match=r"differs from the embedding that this head is tied to; untie"):
        fill_adapter(again, tensors)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_plain_load_finds_what_is_not_finite_in_any_tensor(make_gpt2):
    model = inject(make_gpt2(), lora(["c_attn"]))
    good = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    for key in good:
        bad = good | {key: torch.full_like(good[key], float("inf"))}
        with pytest.raises(CheckpointError, match=f"state dict: {key} holds NaN or infinity"):
            fill_adapter(model, bad)


@pytest.mark.parametrize("count", [2**16 - 1, 2**16, 2**16 + 1])
def test_not_finite_names_the_first_of_any_size(count):
    fine, bad = torch.ones(count), torch.ones(count)
    bad[-1] = float("nan")
    small = torch.ones(3)
    assert not_finite({}) is None and not_finite({"a": fine, "b": small}) is None and not_finite({"a": fine}) is None
    assert not_finite({"a": fine, "b": bad, "c": bad}) == "b" == not_finite({"a": small, "b": bad})
    assert not_finite({"a": fine, "b": small / 0}) == "b"


def test_files_of_a_task_or_of_patterns_say_what_they_came_to(make_gpt2, make_llama):
    assert saved_config(inject(make_gpt2(), lora(task_type="CAUSAL_LM")))["auto_mapping"] is None
    mapping = saved_config(inject(make_gpt2(), lora()))["auto_mapping"]
    assert mapping["base_model_class"] == "GPT2LMHeadModel" and mapping["parent_library"].startswith("transformers")
    content = saved_config(inject(make_gpt2(), lora(rank_pattern={r"0\.attn.*": 2}, alpha_pattern={"mlp.c_proj": 5})))
    assert content["rank_pattern"] == {"transformer.h.0.attn.c_attn": 2}
    assert content["alpha_pattern"] == {"mlp.c_proj": 5}


def test_a_default_that_is_a_regex_stays_one(make_llama):
    model = make_llama()
    model.config.model_type = "gemma4"
    model._modules["language_model"] = model._modules.pop("model")
    assert saved_config(inject(model, lora(None)))["target_modules"] == DEFAULT_TARGETS["gemma4"]


def test_what_is_loaded_without_a_word_is_active_and_frozen(folder, make_gpt2):
    model = make_gpt2()
    load_adapter(model, folder)
    assert model._minilora_adapters.active == ("default",)
    assert not any(
        p.requires_grad
        for value in model._minilora_adapters.slots.values()
        for p in own_parameters(value.kept["default"])
    )
    remove(WEIGHTS_FILE)(folder)
    with pytest.raises(CheckpointError):
        load_adapter(model, folder, "second")


def test_values_of_a_folder_are_strict_unless_told(folder, make_gpt2):
    edit_tensors(lambda tensors: tensors.pop(B1))(folder)
    with pytest.raises(CheckpointError, match=f"{B1} is missing"):
        checkpoint.load_values(make_gpt2(), read_adapter(folder), "default")
