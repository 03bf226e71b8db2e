"""The law on mixtures of experts: an adapted model is the model with ``W_e + delta_weight()_e``, and all that follows from it."""

import copy

import pytest
import torch

import minilora
from minilora.lora.adapter import variants_on
from minilora.lora.slots import adapters_in, adapters_of
from minilora.lora.update import spectrum, update_norm
from minilora.quant.config import QuantConfig
from tests.models import moe

pytest.importorskip("transformers")
IDS = torch.arange(21).view(3, 7)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
PACKED = {"nf4": QuantConfig("nf4"), "nested": QuantConfig("nf4", 32, True), "int8": QuantConfig("int8", 32)}
VARIANTS = sorted(variants_on("experts"))


def config(**fields):
    return minilora.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | fields))


def named(variant):
    """The config that means a variant."""
    fields = {"dora": {"use_dora": True}, "lora": {}, "lora_fa": {}}
    return config(**fields.get(variant, {"init_lora_weights": variant}))


def adapted(model, variant="lora", seed=3, name="default", **fields):
    own = named(variant) if not fields else config(**fields)
    minilora.inject(model, own, name, "lora_fa" if variant == "lora_fa" else None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapters_of(model).named(name).values():
            for own_name, parameter in value.named_parameters():
                if not own_name.startswith("base_layer") and (parameter.requires_grad or name != "default"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def close(found, wanted, share=1e-5):
    assert torch.isfinite(found).all()
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


@pytest.mark.parametrize("base", ["dense", *PACKED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapted_model_is_the_model_with_the_updates_in_its_weights(variant, base):
    model = moe()
    if base != "dense":
        if variant == "loftq":
            pytest.skip("it packs the experts itself")
        minilora.quantize_model(model, PACKED[base])
    plain = logits(model)
    adapted(model, variant)
    found = logits(model)
    assert float((found - plain).abs().max()) > 1e-3
    minilora.merge(model)
    close(logits(model), found)
    minilora.unmerge(model)
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_begins_as_nothing_and_leaves_nothing(variant):
    model = moe()
    keys, plain = list(model.state_dict()), logits(model)
    minilora.inject(model, named(variant), variant="lora_fa" if variant == "lora_fa" else None)
    assert variant == "loftq" or float((logits(model) - plain).abs().max()) < 1e-5
    if variant != "loftq":
        with adapters_of(model).bare():
            assert torch.equal(logits(model), plain)
        minilora.unload(model)
        assert torch.equal(logits(model), plain)
        assert list(model.state_dict()) == keys


def test_adapters_add_up():
    model = adapted(moe(), target_modules="all-linear", r=4)
    adapted(model, name="other", seed=4, r=3, lora_alpha=5)
    minilora.set_adapter(model, ["default", "other"])
    both = logits(model)
    minilora.merge(model, "other")
    close(logits(model), both)
    twin = copy.deepcopy(model)
    minilora.merge(twin, "default")
    close(logits(twin), both)


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_every_row_of_a_batch_has_its_own_adapter(base):
    model = moe()
    if base != "dense":
        minilora.quantize_model(model, PACKED[base])
    adapted(model)
    adapted(model, name="other", seed=4, r=2, lora_alpha=5, target_modules=None, target_parameters=[EXPERTS[1]])
    wanted = []
    for at, name in enumerate(["other", "default"]):
        minilora.set_adapter(model, name)
        wanted.append(logits(model, IDS[at : at + 1]))
    with adapters_of(model).bare():
        wanted.append(logits(model, IDS[2:]))
    with minilora.batch_adapters(model, ["other", "default", "__base__"]):
        close(logits(model), torch.cat(wanted))


def test_only_experts_that_saw_a_token_get_a_gradient():
    model = adapted(moe()).train()
    model(IDS[:1, :2]).logits.sum().backward()
    seen = {}
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.update(index=args[1]))
    model(IDS[:1, :2])
    hook.remove()
    chosen = set(seen["index"].unique().tolist())
    layer = adapters_of(model).named("default")["model.layers.0.mlp.experts.gate_up_proj"]
    moved = {e for e in range(5) if layer.lora_B.grad[e].abs().sum() > 0}
    assert moved == chosen and 0 < len(chosen) < 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_brings_the_same_adapter(variant, tmp_path):
    model = adapted(moe(), variant)
    found = logits(model)
    minilora.save_adapter(model, tmp_path / "a")
    other = moe()
    minilora.load_adapter(other, tmp_path / "a")
    close(logits(other), found, 1e-6)
    with pytest.raises(minilora.MiniLoraError, match="another base model"):
        minilora.load_adapter(moe(seed=1), tmp_path / "a")
    with pytest.raises(minilora.MiniLoraError, match=r"other names or shapes|size mismatch"):
        minilora.load_adapter(moe(num_experts=6), tmp_path / "a")


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)  # it looks at modules only
def test_peft_computes_the_same_from_the_file(tmp_path):
    peft = pytest.importorskip("peft")
    fields = {
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"down_proj": 9},
    }
    model = adapted(moe(), r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True, **fields)
    minilora.save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(moe(), tmp_path / "a")
    close(logits(theirs), logits(model), 1e-6)
    theirs.save_pretrained(tmp_path / "b")
    back = moe()
    minilora.load_adapter(back, tmp_path / "b")
    close(logits(back), logits(model), 1e-6)


def test_weights_are_exchanged_in_place(tmp_path):
    wanted = adapted(moe(), seed=8, r=2, lora_alpha=7)
    minilora.save_adapter(wanted, tmp_path / "a")
    model = adapted(moe())
    minilora.hotswap_adapter(model, tmp_path / "a")
    close(logits(model), logits(wanted))


@pytest.mark.parametrize("how", ["cat", "svd", "linear", "ties", "dare_ties_svd"])
def test_adapters_are_combined(how):
    model = adapted(moe())
    adapted(model, name="other", seed=4)
    minilora.add_weighted_adapter(
        model, ["default", "other"], [0.7, -0.4], "both", how, density=None if how in ("cat", "svd", "linear") else 1.0
    )
    if how in ("cat", "svd"):
        values = {name: adapters_of(model).named(name) for name in ("default", "other", "both")}
        for path, value in values["both"].items():
            wanted = 0.7 * values["default"][path].delta_weight() - 0.4 * values["other"][path].delta_weight()
            if how == "cat":
                torch.testing.assert_close(value.delta_weight(), wanted)
            assert value.delta_weight().shape == wanted.shape
    minilora.set_adapter(model, "both")
    assert torch.isfinite(logits(model)).all()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_spectra_are_each_experts(variant):
    for value in adapters_in(adapted(moe(), variant)):
        if value.on != "experts":
            continue
        wanted = torch.linalg.svdvals(value.delta_weight())
        found = spectrum(value)
        torch.testing.assert_close(found, wanted[..., : found.shape[-1]], rtol=1e-4, atol=1e-5)
        assert update_norm(value) == pytest.approx(float(value.delta_weight().norm()), rel=1e-4)


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 20,
        "intermediate_size_mlp": 36,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": 0}
    routing = {"num_local_experts": 3, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **routing)).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def jetmoe():
    from transformers import JetMoeConfig, JetMoeForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
    }
    torch.manual_seed(0)
    known = JetMoeConfig(vocab_size=61, num_local_experts=4, num_experts_per_tok=2, **sizes)
    return JetMoeForCausalLM(known).requires_grad_(False).eval()


def test_rows_of_a_batch_keep_their_adapters_where_experts_get_all_tokens():
    """Llama 4 gives every token to every expert: the place of a row says its expert, and not its token alone."""
    model = adapted(
        llama4(),
        r=3,
        lora_alpha=12,
        target_modules=None,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    alone = logits(model)
    with adapters_of(model).bare():
        plain = logits(model)
    assert float((alone - plain).abs().max()) > 1e-3
    with minilora.batch_adapters(model, ["default", "__base__", "default"]):
        close(logits(model), torch.stack([alone[0], plain[1], alone[2]]))


def test_a_batch_is_refused_where_experts_get_rows_that_nobody_says_whose_they_are():
    model = adapted(jetmoe(), r=3, lora_alpha=12, target_modules=None, target_parameters=["input_linear.weight"])
    with (
        minilora.batch_adapters(model, ["default", "__base__", "default"]),
        pytest.raises(minilora.MiniLoraError, match=r"input_linear.weight: its experts get rows.*use set_adapter"),
    ):
        logits(model)


def test_a_file_of_peft_has_all_that_its_target_parameters_name(tmp_path):
    """PEFT looks at its other fields for layers only, so its file has factors for experts that these seem to leave out."""
    peft = pytest.importorskip("peft")
    for at, more in enumerate(({"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.mlp.experts"]})):
        fields = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"], "target_parameters": list(EXPERTS)}
        theirs = peft.get_peft_model(moe(), peft.LoraConfig(**fields, **more))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        theirs.save_pretrained(tmp_path / str(at))
        model = moe()
        minilora.load_adapter(model, tmp_path / str(at))
        close(logits(model), logits(theirs), 1e-6)
