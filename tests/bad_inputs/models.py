"""Rows about models: what cannot be adapted, switched, merged, combined, mixed, packed or trained."""

# ruff: noqa: E501  (a row is one line)

import torch
from torch import nn

import minilora
from minilora import (
    QuantConfig,
    add_weighted_adapter,
    batch_adapters,
    calibrate,
    get_peft_model,
    inject,
    quantize,
    quantize_model,
)
from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, DataError, QuantizationError, StateError, TargetError
from minilora.linear.ops import quant_linear
from minilora.training.loop import TrainConfig, train
from tests.bad_inputs.world import lora

NAN, INF = float("nan"), float("inf")


def into(model, *targets, **fields):
    """A call that injects this config into that model of the world."""
    config = lora(*targets, **fields)
    return lambda w: inject(getattr(w, model), config)


INJECT = [
    ("a typo", into("plain", "frist"), TargetError, "'frist'", "'first'"),
    ("a typo among several", into("plain", "first", "mdi"), TargetError, "'mdi'", "'mid'"),
    ("an empty name", into("plain", ""), TargetError, "entry ''", "closest names"),
    ("part of a name", into("llama", "_proj"), TargetError, "'_proj'", "'q_proj'"),
    ("no name", into("plain"), ConfigError, "target_modules is empty", "name modules"),
    ("a regex of nothing", into("plain", target_modules="x.*"), TargetError, "'x.*' matches no full path", "paths look like"),
    ("a bad regex", into("plain", target_modules="first|(mid"), ConfigError, "'first|(mid'", "a list of names needs no escaping"),
    ("a name as a regex", into("llama", target_modules="q_proj"), TargetError, "'q_proj' is one string", "write ['q_proj']"),
    ("a norm", into("plain", "norm"), TargetError, "norm is a LayerNorm", "wanted Linear, Conv1D or Embedding"),
    ("a block", into("llama", "mlp"), TargetError, "mlp is a LlamaMLP", "name its linear layers"),
    ("no default", into("plain", target_modules=None), TargetError, "model_type=None", "'all-linear'"),
    ("no linear layer", lambda w: inject(nn.Sequential(nn.ReLU()), lora(target_modules="all-linear")), TargetError, "No modules were targeted", "loosen"),
    ("a GRU", lambda w: inject(nn.Sequential(nn.GRU(3, 4)), lora("0")), TargetError, "0 is a GRU", "wanted Linear"),
    ("a transposed convolution", lambda w: inject(nn.Sequential(nn.ConvTranspose2d(3, 4, 1)), lora("0")), TargetError, "0 is a ConvTranspose2d", "wanted Linear"),
    ("an odd rank on groups", lambda w: inject(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), lora("0", r=3)), ConfigError, "r=3 on a convolution of 2 groups", "rank_pattern"),
    ("dropout on an attention", lambda w: inject(nn.Sequential(nn.MultiheadAttention(4, 2)), lora("0", lora_dropout=0.1)), ConfigError, "lora_dropout=0.1 cannot be done", "exclude_modules"),
    ("an attention of three widths", lambda w: inject(nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3)), lora("0")), TargetError, "kdim=3", "exclude_modules"),
    ("all excluded", into("plain", "first", exclude_modules=["first"]), TargetError, "No modules were targeted", "exclude_modules"),
    ("excluded typo", into("plain", "first", exclude_modules=["lsat"]), TargetError, "exclude_modules entry 'lsat'", "'last'"),
    ("excluded bad regex", into("plain", "first", exclude_modules="["), ConfigError, "exclude_modules='['", "a list of names"),
    ("saved typo", into("plain", "first", modules_to_save=["haed"]), TargetError, "modules_to_save entry 'haed'", "closest names"),
    ("saved in saved", into("llama", "q_proj", modules_to_save=["layers.0", "layers.0.mlp"]), TargetError, "layers.0.mlp lies in", "name only one"),
    ("saved and packed", into("packed", "first", modules_to_save=["mid"]), TargetError, "mid is quantized", "cannot be trained whole; "),
    ("layer 99", into("llama", "q_proj", layers_to_transform=[0, 99]), TargetError, "99 is not there", "layers 0 to 1"),
    ("no layers", into("plain", "first", layers_to_transform=0), TargetError, "0 is not there", "no numbered layer"),
    ("idle rank pattern", into("plain", "first", rank_pattern={"frist": 2}), TargetError, "rank_pattern key 'frist'", "'first'"),
    ("idle alpha pattern", into("plain", "first", alpha_pattern={"mid": 2}), TargetError, "alpha_pattern key 'mid'", "'first'"),
    ("tokens without a table", into("plain", "first", trainable_token_indices=[1]), TargetError, "get_input_embeddings()", "give {'name': [...]}"),
    ("tokens of a linear", into("llama", "q_proj", trainable_token_indices={"k_proj": [1]}), TargetError, "k_proj is a Linear", "wanted an Embedding"),
    ("token too large", into("llama", "q_proj", trainable_token_indices=[64]), TargetError, "token 64", "wanted "),
    ("tokens typo", into("llama", "q_proj", trainable_token_indices={"embed_tokns": [1]}), TargetError, "'embed_tokns'", "embed_tokens"),
    ("a tied table", into("gpt2", "wte"), TargetError, "shares its weight with lm_head", "ensure_weight_tying=True"),
    ("LoftQ on a table", into("llama", "embed_tokens", init_lora_weights="loftq"), TargetError, "is an Embedding", "leave it out"),
    ("twice in the model", lambda w: inject(w.shared(), lora("0")), TargetError, "0 and 1 are one shared layer", "its own copy"),
    ("an odd rank in halves", into("plain", "first", r=7, init_lora_weights="orthogonal"), ConfigError, "got 7 instead", "Set r=8"),
    ("LoftQ on packed", into("packed", "first", init_lora_weights="loftq"), TargetError, "first: is packed already", "give it the dense model"),
    *((f"name {n!r}"[:20], lambda w, n=n: inject(w.plain, lora("first"), n), StateError, "adapter name", "1 to 64 letters") for n in ("../x", "", "a" * 65, 5, "/etc/x", "a b", "é")),
    ("a taken name", lambda w: inject(w.adapted, lora("first"), "other"), StateError, "'other' already", "another name"),
    ("get_peft_model twice", lambda w: get_peft_model(w.adapted, lora("first")), StateError, "['default', 'other'] already", "unload()"),
    ("an unknown variant", lambda w: inject(w.plain, lora("first"), variant="vear"), ConfigError, "'vear'", "'vera'"),
    ("a dict as config", lambda w: inject(w.plain, {"r": 8}), ConfigError, "dict", "wanted a LoraConfig"),
    ("a name as config", lambda w: get_peft_model(w.plain, "lora"), ConfigError, "str", "wanted a LoraConfig"),
    ("a name as model", lambda w: inject("smollm2", lora("first")), StateError, "str", "wanted a torch module"),
    ("None as model", lambda w: get_peft_model(None, lora("first")), StateError, "NoneType", "wanted a torch module"),
]  # fmt: skip

SWITCH = [
    ("switch to nobody", lambda w: w.adapted.set_adapter("defalut"), StateError, "'defalut'", "'default'"),
    ("switch to one twice", lambda w: w.adapted.set_adapter(["other", "other"]), StateError, "'other' is named twice", "name it once"),
    ("switch to a number", lambda w: w.adapted.set_adapter(5), StateError, "5", "wanted a name"),
    ("switch without adapters", lambda w: minilora.set_adapter(w.plain, "x"), StateError, "MLP has no adapters", "get_peft_model"),
    ("switch while merged", lambda w: w.merged.set_adapter("other"), StateError, "['default'] are merged", "unmerge_adapter() first"),
    ("delete nobody", lambda w: w.adapted.delete_adapter("fr"), StateError, "Adapter fr does not exist", "there are 'default'"),
    ("delete a merged one", lambda w: w.merged.delete_adapter("default"), StateError, "['default'] while they are merged", "unmerge them first"),
    ("unload nothing", lambda w: minilora.unload(w.plain), StateError, "MLP has no adapters", "get_peft_model"),
    ("unmerge nothing", lambda w: w.adapted.unmerge_adapter(), StateError, "no adapter is merged", "merge "),
    ("unmerge a plain one", lambda w: minilora.unmerge(w.plain), StateError, "MLP has no adapters", "get_peft_model"),
    ("merge nobody", lambda w: w.adapted.merge_adapter(["fr"]), StateError, "'fr'", "there are 'default'"),
    ("merge none", lambda w: w.adapted.merge_adapter([]), StateError, "nothing to merge", "name one"),
    ("merge one twice", lambda w: minilora.merge(w.adapted, ["other", "other"]), StateError, "'other' is named twice", "name it once"),
    ("merge again", lambda w: minilora.merge(w.merged), StateError, "['default'] are merged already", "unmerge first"),
    ("merge other names", lambda w: w.merged.merge_and_unload(adapter_names=["other"]), StateError, "['default'] are merged already", "unmerge_adapter()"),
    ("merge by position", lambda w: w.adapted.merge_and_unload("other"), StateError, "'other'", "adapter_names='other' by name"),
    ("merge NaN", lambda w: minilora.merge(w.poisoned()), StateError, "The adapter default seems to be broken", "load an earlier save"),
    ("merge into NaN", lambda w: _merge_into(w, NAN), StateError, "first: its base weight holds NaN", "load it again"),
    ("merge over fp16", lambda w: _merge_into_half(w), StateError, "first: the merged weight overflows torch.float16", "bfloat16 or float32"),
    ("merge a tied head", lambda w: minilora.merge(inject(w.gpt2, lora("lm_head"))), StateError, "shares its weight with", "minilora.untie"),
    ("from a name", lambda w: minilora.PeftModel.from_pretrained("smollm2", w.tmp), StateError, "str", "the loaded base model"),
]  # fmt: skip


def _merge_into(w, value):
    model = w.with_adapter()
    with torch.no_grad():
        model.first.base_layer.weight[0, 0] = value
    minilora.merge(model)


def _merge_into_half(w):
    model = inject(w.make_mlp().half(), lora("first"))
    with torch.no_grad():
        model.first.lora_B.fill_(1e5)
    minilora.merge(model)


def combine(weights=(1.0, 1.0), names=("default", "other"), new="both", **options):
    return lambda w: add_weighted_adapter(w.adapted, list(names), list(weights), new, **options)


def mixed(names, rows=3, **fields):
    """A call that runs a batch of so many rows with these names, of a model with this config if there is one."""

    def call(w):
        model = w.with_adapter(**fields) if fields else w.adapted
        with batch_adapters(model, names):
            model(torch.randn(rows, 12))

    return call


def _two_copies(w):
    model = w.with_adapter("first", modules_to_save=["last"])
    model.add_adapter("other", lora("first", modules_to_save=["last"]))
    return model


def _mixed_while_training(w):
    with batch_adapters(w.adapted.train(), ["other"]):
        pass


def _mixed_while_merged(w):
    with batch_adapters(w.merged, ["other"]):
        pass


def _mixed_while_disabled(w):
    with w.adapted.disable_adapter(), batch_adapters(w.adapted, ["other"]):
        pass


MANY = [
    ("a sum of nobody", combine(names=("default", "ohter")), StateError, "'ohter'", "'other'"),
    ("a sum with few weights", combine(weights=(1.0,)), ConfigError, "2 adapters and 1 weights", "one weight for each"),
    ("a sum of none", combine(weights=(), names=()), ConfigError, "0 adapters", "one weight for each"),
    ("a sum with NaN", combine(weights=(1.0, NAN)), ConfigError, "weights=[1.0, nan]", "wanted finite numbers"),
    ("a sum with words", combine(weights=(1.0, "2")), ConfigError, "weights=[1.0, '2']", "wanted finite numbers"),
    ("a sum of a new kind", combine(combination_type="tise"), ConfigError, "'tise'", "'ties'"),
    ("ties without density", combine(combination_type="ties"), ConfigError, "density=None", "in (0, 1]"),
    *((f"density {d}", combine(combination_type="ties_svd", density=d), ConfigError, "density=", "in (0, 1]") for d in (0, 1.5, NAN, "half")),
    ("a majority of none", combine(combination_type="ties_svd", density=0.5, majority_sign_method="mean"), ConfigError, "'mean'", "'frequency'"),
    *((f"svd rank {r!r}", combine(svd_rank=r), ConfigError, "svd_rank=", "whole number >= 1") for r in (0, 2.0, True)),
    ("linear of two ranks", combine(combination_type="linear"), StateError, "first: ranks [3, 2]", "use 'cat' or 'svd'"),
    ("a sum by a taken name", combine(new="other"), StateError, "'other' already", "another name"),
    ("a sum by a bad name", combine(new="a/b"), StateError, "'a/b'", "1 to 64 letters"),
    ("a sum of DoRA", lambda w: add_weighted_adapter(w.with_adapter(use_dora=True), ["default"], [1.0], "new"), StateError, "adapter 'default', first", "merge it instead"),
    ("a sum of copies", lambda w: add_weighted_adapter(_two_copies(w), ["default", "other"], [1.0, 1.0], "new"), StateError, "last, copied by 'default' and 'other'", "leave one of them out"),
    ("a sum without adapters", lambda w: add_weighted_adapter(w.plain, ["a"], [1.0], "b"), StateError, "MLP has no adapters", "get_peft_model"),
    ("rows of nobody", mixed(["other", "ohter", "__base__"]), StateError, "'ohter'", "'other'"),
    ("rows without names", mixed([]), StateError, "no adapter names", "one for each row"),
    ("rows and names", mixed(["other", "default"]), StateError, "2 adapter names for 3 rows", "one name for each row"),
    ("rows while training", _mixed_while_training, StateError, "for inference", "model.eval()"),
    ("rows while merged", _mixed_while_merged, StateError, "['default'] are merged", "unmerge before"),
    ("rows while disabled", _mixed_while_disabled, StateError, "disabled here", "leave disable_adapter()"),
    ("rows of DoRA", mixed(["default"] * 3, use_dora=True), StateError, "adapter 'default', first", "merge it instead"),
    ("rows of a bias", mixed(["default"] * 3, bias="lora_only"), StateError, "trains first.bias", "activate another"),
]  # fmt: skip


def weight(value=None, shape=(4, 64), dtype=torch.float32):
    made = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).to(dtype)
    if value is not None:
        made[0, 1] = value
    return made


def weighted(importance):
    return lambda w: quantize(weight(), QuantConfig(scale="weighted"), "w", importance)


def _quantize_a_bad_layer(w):
    with torch.no_grad():
        w.plain.last.weight[0, 0] = INF
    quantize_model(w.plain)


def _never_runs():
    model = nn.ModuleDict({"used": nn.Linear(4, 64), "idle": nn.Linear(4, 64)})
    model.forward = lambda x: model["used"](x)
    return model


PACK = [
    ("NaN", lambda w: quantize(weight(NAN), name="w"), QuantizationError, "w holds NaN or infinity", "find what wrote it"),
    ("infinity", lambda w: quantize(weight(-INF), name="w"), QuantizationError, "w holds NaN or infinity", "find what wrote it"),
    ("nothing", lambda w: quantize(torch.empty(0, 8), name="w"), QuantizationError, "w is empty", "leave it unquantized"),
    ("whole numbers", lambda w: quantize(torch.ones(8, 8, dtype=torch.int64), name="w"), QuantizationError, "w is torch.int64", "cast it first"),
    ("float64", lambda w: quantize(weight(dtype=torch.float64), name="w"), QuantizationError, "w is torch.float64", "cast it first"),
    ("a list", lambda w: quantize([1.0, 2.0], name="w"), QuantizationError, "w is a list", "wanted a tensor"),
    ("a name as config", lambda w: quantize(weight(), "nf4"), ConfigError, "'nf4'", "QuantConfig('nf4')"),
    ("a name as config of a model", lambda w: quantize_model(w.plain, "nf4"), ConfigError, "'nf4'", "QuantConfig('nf4')"),
    ("scales that overflow", lambda w: quantize(torch.full((256, 64), 3e38), QuantConfig(double_quant=True), "w"), QuantizationError, "w: the mean of its scales", "double_quant=False"),
    ("no importance", weighted(None), QuantizationError, "w: scale='weighted'", "minilora.calibrate"),
    ("short importance", weighted(torch.ones(63)), QuantizationError, "w: importance is [63]", "wanted [64]"),
    ("negative importance", weighted(-torch.ones(64)), QuantizationError, "w: importance", "not negative"),
    ("NaN importance", weighted(torch.full((64,), NAN)), QuantizationError, "w: importance", "finite"),
    ("importance of nothing", weighted(torch.ones(0)), QuantizationError, "w: importance is [0]", "wanted [64]"),
    ("out of another shape", lambda w: quantize(weight()).dequantize(out=torch.empty(64, 4)), QuantizationError, "out is (64, 4)", "contiguous (4, 64)"),
    ("a model with adapters", lambda w: quantize_model(w.adapted), StateError, "carries adapters", "quantize it first"),
    ("a bad layer", _quantize_a_bad_layer, QuantizationError, "last.weight holds NaN or infinity", "find what wrote it"),
    ("a layer typo", lambda w: quantize_model(w.plain, None, ["frist"]), TargetError, "'frist'", "'first'"),
    ("a norm", lambda w: quantize_model(w.plain, None, ["norm"]), TargetError, "norm is a LayerNorm", "wanted Linear"),
    ("a packed layer", lambda w: quantize_model(w.packed, None, ["first"]), TargetError, "first is quantized already", "leave it out"),
    ("a packed model", lambda w: quantize_model(w.packed), TargetError, "no dense linear layer is left", "; "),
    ("a table", lambda w: quantize_model(w.llama, None, ["embed_tokens"]), TargetError, "embed_tokens: Embedding has no packed form", "quantize linear layers"),
    ("a model without importance", lambda w: quantize_model(w.plain, QuantConfig(scale="weighted")), QuantizationError, "first: scale='weighted'", "minilora.calibrate"),
    ("a name as model", lambda w: quantize_model("smollm2"), StateError, "str", "wanted a torch module"),
    ("calibrate on nothing", lambda w: calibrate(w.plain, []), QuantizationError, "first saw no input", "at least one batch"),
    ("calibrate what never runs", lambda w: calibrate(_never_runs(), [torch.randn(2, 4)]), QuantizationError, "idle saw no input", "runs every layer"),
    ("calibrate a typo", lambda w: calibrate(w.plain, [torch.randn(2, 12)], ["lsat"]), TargetError, "'lsat'", "'last'"),
    ("calibrate text", lambda w: calibrate(w.llama, ["some text"]), QuantizationError, "a batch is a str", "wanted token ids"),
    ("x of another width", lambda w: quant_linear(torch.randn(2, 63), quantize(weight())), QuantizationError, "(2, 63)", "wanted [..., in]"),
    ("an unknown backend", lambda w: quant_linear(torch.randn(2, 64), quantize(weight()), backend="cuda"), ConfigError, "backend='cuda'", "wanted None or one of"),
]  # fmt: skip

GOOD = Encoded((1, 2, 3), (-100, 2, 3))


def trained(make, examples=(GOOD,), pad=0, evaluation=(), **fields):
    def call(w):
        model = make(w)
        train(model, list(examples), TrainConfig(steps=1), w.tmp / "run", pad, evaluation, say=lambda line: None)

    return call


def small(w):
    return get_peft_model(w.make_llama(), lora("q_proj"))


def _merged(w):
    model = small(w)
    model.merge_adapter()
    return model


TRAIN = [
    ("train without adapters", trained(lambda w: w.llama), StateError, "no adapter", "inject one"),
    ("train frozen", trained(lambda w: small(w).requires_grad_(False)), StateError, "no parameter requires grad", "is_trainable=True"),
    ("train everything", trained(lambda w: small(w).requires_grad_(True)), StateError, "requires grad and belongs to no active", "modules_to_save"),
    ("train merged", trained(_merged), StateError, "['default'] are merged", "unmerge first"),
    ("no example", trained(small, []), DataError, "no example", "give one"),
    ("labels all -100", trained(small, [Encoded((1, 2), (-100, -100))]), DataError, "example 1: every label is -100", "leave it out"),
    ("only the first label", trained(small, [GOOD, Encoded((1, 2), (1, -100))]), DataError, "example 2: every label", "leave it out"),
    ("a token too large", trained(small, [Encoded((1, 64), (1, 64))]), DataError, "id 64", "rows 0 to 63"),
    ("a negative token", trained(small, [Encoded((1, -3), (1, 2))]), DataError, "id -3", "rows 0 to 63"),
    ("a label too large", trained(small, [Encoded((1, 2), (1, 99))]), DataError, "id 99", "rows 0 to 63"),
    ("too long", trained(small, [Encoded((1,) * 33, (1,) * 33)]), DataError, "33 tokens", "max_length=32"),
    ("a bad evaluation", trained(small, evaluation=[Encoded((1, 2), (-100, -100))]), DataError, "evaluation example 1", "leave it out"),
    ("padding too large", trained(small, pad=64), DataError, "pad_id=64", "wanted one of them"),
    ("no padding", trained(small, pad=None), DataError, "pad_id=None", "wanted"),
]  # fmt: skip

ROWS = [
    (f"{about}: {label}", *rest)
    for about, rows in (("inject", INJECT), ("switch", SWITCH), ("many", MANY), ("pack", PACK), ("train", TRAIN))
    for label, *rest in rows
]
