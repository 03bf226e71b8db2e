"""A config that llama.cpp does not open, or computes otherwise, is refused by the field's name before a GGUF file is written."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")
from minilora.errors import CheckpointError
from minilora.hf.gguf_limits import longest, shortened
from minilora.hf.gguf_merge import fill_model
from minilora.hf.gguf_metadata import WRITTEN, metadata
from tests.gguf import tiny

SHARED = ("qwen2", "qwen2_moe", "olmoe", "olmo2", "phi", "phi3", "starcoder2", "stablelm", "cohere")
PARTIAL = ("phi", "phi3", "stablelm", "gpt_neox")
HALF = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("kind", sorted(WRITTEN))
def test_a_tiny_config_of_every_kind_is_written(kind):
    assert metadata(tiny.config(kind))


@pytest.mark.parametrize("kind", SHARED)
def test_heads_of_another_width_than_they_share(kind):
    """llama.cpp opens none of these: it takes the sides of queries for the model's width."""
    with pytest.raises(CheckpointError, match=r"head_dim=32, which llama.cpp does not compute \(16\)"):
        metadata(tiny.config(kind, head_dim=32))
    assert metadata(tiny.config(kind, head_dim=16))


@pytest.mark.parametrize("kind", sorted({*WRITTEN} - {"gpt2", "gemma3_text"}))
def test_parts_of_heads_that_turn(kind):
    """llama.cpp ends at most of these, and turns half a head of Gemma and Command-R, of which transformers turns all."""
    made = tiny.config(kind, rope_parameters=HALF)
    if kind in PARTIAL:
        said = metadata(made)
        assert next(value for key, value in said.items() if key.endswith("rope.dimension_count")) == 8
    else:
        with pytest.raises(CheckpointError, match=r"partial_rotary_factor=0\.5"):
            metadata(made)


def test_both_kinds_of_layers_of_gemma_3_turn_whole_heads():
    both = {"full_attention": dict(HALF, partial_rotary_factor=1.0), "sliding_attention": HALF}
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor=0\.5"):
        metadata(tiny.config("gemma3_text", rope_parameters=both))


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("olmoe", {"num_key_value_heads": 2}, r"num_key_value_heads=2, .* \(4\)"),
        *((kind, {"tie_word_embeddings": True}, "tie_word_embeddings=True") for kind in ("qwen2_moe", "olmoe")),
        *((kind, {"tie_word_embeddings": False}, "tie_word_embeddings") for kind in ("gemma", "gemma2", "cohere")),
        *((kind, {"use_bidirectional_attention": True}, "use_bidirectional") for kind in ("gemma", "gemma2")),
        ("smollm3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}, "layer_types"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("cohere", {"num_hidden_layers": 64}, r"num_hidden_layers=64, .* \(at most 63\)"),
        ("llama", {"num_hidden_layers": 513}, "at most 512"),
        ("qwen3_moe", {"num_experts": 513}, "at most 512"),
        ("gemma2", {"query_pre_attn_scalar": 16}, r"query_pre_attn_scalar=16, .* \(32\)"),
        ("gemma2", {"query_pre_attn_scalar": 32, "num_hidden_layers": 46}, r"query_pre_attn_scalar=32, .* \(16\)"),
        ("gemma3_text", {"query_pre_attn_scalar": 32, "num_hidden_layers": 62}, "query_pre_attn_scalar=32"),
    ],
)
def test_what_llama_cpp_takes_for_granted(kind, fields, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        metadata(tiny.config(kind, **fields))
    assert str(caught.value).endswith("merge into a folder and serve that by another program")


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("cohere", "logit_scale"),
        *(("granite", name) for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier")),
        ("granite", "logits_scaling"),
    ],
)
def test_a_scale_of_zero_is_none_to_llama_cpp(kind, field):
    with pytest.raises(CheckpointError, match=rf"{field}=0.0, .* \(0 means none there\)"):
        metadata(tiny.config(kind, **{field: 0.0}))


def test_whole_numbers_are_written_as_the_fractions_that_llama_cpp_reads():
    said = metadata(tiny.config("granite", logits_scaling=2, embedding_multiplier=3))
    assert {type(value) for key, value in said.items() if key.endswith(("scale", "epsilon"))} == {float}


def test_the_largest_gemma_scales_by_what_heads_share():
    assert metadata(tiny.config("gemma2", query_pre_attn_scalar=16, num_hidden_layers=46))
    assert metadata(tiny.config("gemma3_text", query_pre_attn_scalar=16, num_hidden_layers=62))


def test_a_field_that_nobody_reads_has_to_be_at_its_default():
    from transformers import LlamaConfig

    class Later(LlamaConfig):
        sinks: bool = False

    assert metadata(Later())
    assert metadata(Later(attention_dropout=0.1, initializer_range=0.5))
    with pytest.raises(CheckpointError, match=r"llama: its config has sinks=True, which llama.cpp does not compute"):
        metadata(Later(sinks=True))


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2"])
def test_a_window_that_llama_cpp_has_not_is_the_context_of_the_file(kind):
    """As Phi-3-mini-4k's 2,047 of 4,096: as far as the window reaches, llama.cpp computes the model."""
    made = tiny.config(kind, sliding_window=8)
    context = {key.rpartition(".")[2]: value for key, value in metadata(made).items()}["context_length"]
    assert context == longest(made) == 8
    assert shortened(made).startswith("says a context of 8 tokens, its window, and not 64: beyond it")
    for whole in (64, 100, None):
        made = tiny.config(kind, sliding_window=whole)
        assert longest(made) == 64 and not shortened(made)


def test_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="head_dim=32"):
        fill_model(tiny.model("qwen2", head_dim=32), tiny.tokenizer(), tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())
