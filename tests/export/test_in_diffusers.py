"""Exports for diffusers in its own loaders: a pipeline's part with the loaded file computes what minilora's adapter computed."""

import pytest
import safetensors.torch
import torch

from minilora import LoraConfig, inject, save_adapter
from minilora.cli import main
from minilora.errors import ConfigError, StateError
from minilora.export.diffusers import DIFFUSERS_FILE
from minilora.export.folders import export_adapter, export_folder
from tests.models import finished, randomize

diffusers = pytest.importorskip("diffusers")


def unet():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    return finished(diffusers.UNet2DConditionModel(**sizes, **blocks, cross_attention_dim=24, attention_head_dim=4))


def flux():
    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 4, 8),
    }
    return finished(diffusers.FluxTransformer2DModel(**sizes, guidance_embeds=False))


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 90,
    }
    return finished(CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=16, bos_token_id=0, eos_token_id=2)))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def out_of(model):
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(noise(1, 4, 8, 8), 7, noise(1, 5, 24)).sample
    if isinstance(model, diffusers.FluxTransformer2DModel):
        ids = torch.zeros(4, 3), torch.zeros(5, 3)
        return model(noise(1, 4, 16), noise(1, 5, 24), noise(1, 20), torch.tensor([0.5]), *ids).sample
    return model(torch.arange(7)[None]).last_hidden_state


def attach(name, model, folder):
    """By the loader of the pipeline that has this part."""
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin

    loader = FluxLoraLoaderMixin if name == "transformer" else StableDiffusionLoraLoaderMixin
    found = loader.lora_state_dict(str(folder), return_alphas=True)
    state, alphas = found[0], found[1] if len(found) > 1 else None
    place = {
        "unet": "load_lora_into_unet",
        "transformer": "load_lora_into_transformer",
        "text_encoder": "load_lora_into_text_encoder",
    }
    getattr(loader, place[name])(state, network_alphas=alphas, **{name: model})
    return model


PARTS = {"unet": unet, "transformer": flux, "text_encoder": clip}
LAYERS = {
    "unet": ["to_q", "to_v", "to_out.0"],
    "transformer": ["to_q", "add_k_proj", "proj_mlp"],
    "text_encoder": ["q_proj", "fc1"],
}
FIELDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2, "q_proj": 5}, "alpha_pattern": {"to_q": 11, "fc1": 13}},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("part", PARTS)
def test_the_pipeline_computes_what_the_adapter_computed(tmp_path, part, fields):
    entries = LAYERS[part] + ["conv1", "conv_in"] * (part == "unet" and fields != "pissa")
    model, given = PARTS[part](), FIELDS[fields]
    before = out_of(model)
    for name in ("rank_pattern", "alpha_pattern"):  # those of this model's layers
        if name in given:
            given = given | {name: {key: value for key, value in given[name].items() if key in entries}}
    randomize(inject(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": entries, **given})))
    wanted = out_of(model)
    if (part, fields) == ("text_encoder", "dora"):
        with pytest.raises(StateError, match="passes over the magnitudes of DoRA"):
            export_adapter(model, tmp_path, "diffusers")
        return
    assert (wanted - before).abs().max() > 0.05
    export_adapter(model, tmp_path, "diffusers")
    got = out_of(attach(part, PARTS[part](), tmp_path))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_alone_says_what_it_is(tmp_path, capsys):
    model = unet()
    fields = {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["to_q", "conv1"]}
    randomize(inject(model, LoraConfig(**fields)))
    save_adapter(model, tmp_path / "adapter")
    assert export_folder(tmp_path / "adapter", tmp_path / "a", "diffusers") == 3
    torch.testing.assert_close(out_of(attach("unet", unet(), tmp_path / "a")), out_of(model), rtol=1e-4, atol=1e-4)
    command = ["export", "--adapter", str(tmp_path / "adapter"), "--for", "diffusers", "--out", str(tmp_path / "b")]
    assert main([*command, "--component", "transformer"]) == 0
    assert "adapter for diffusers, rank 3, scale 1" in capsys.readouterr().out
    names = safetensors.torch.load_file(tmp_path / "b" / DIFFUSERS_FILE)
    assert all(name.startswith("transformer.") for name in names)


def test_which_part_it_is_must_be_told_where_it_cannot_be(tmp_path, make_llama):
    model = randomize(inject(make_llama(), LoraConfig(r=3, target_modules=["q_proj"])))
    with pytest.raises(
        StateError, match="LlamaForCausalLM: which part of a pipeline it is cannot be told; give --component"
    ):
        export_adapter(model, tmp_path / "a", "diffusers")
    with pytest.raises(ConfigError, match="component='net': wanted one of unet"):
        export_adapter(model, tmp_path / "a", "diffusers", component="net")
    assert not (tmp_path / "a").exists()
    export_adapter(model, tmp_path / "a", "diffusers", component="text_encoder_2")
    names = safetensors.torch.load_file(tmp_path / "a" / DIFFUSERS_FILE)
    assert names and all(name.startswith("text_encoder_2.model.layers.") for name in names)


def test_what_diffusers_would_not_find_in_a_text_encoder(tmp_path):
    model = inject(clip(), LoraConfig(r=3, target_modules=["token_embedding"]))
    with pytest.raises(StateError, match="takes adapters of linear layers and convolutions only"):
        export_adapter(model, tmp_path / "a", "diffusers")
    model = inject(unet(), LoraConfig(r=3, target_modules=["to_q"]))
    with pytest.raises(StateError, match="of a text encoder diffusers loads adapters of q_proj"):
        export_adapter(model, tmp_path / "a", "diffusers", component="text_encoder")
    assert not (tmp_path / "a").exists()
