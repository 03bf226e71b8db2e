"""NF4 as bitsandbytes stores and computes it: codes, scales and values to the bit, layers and adapters to rounding."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import bitsandbytes as bnb
import peft
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_4bit
from safetensors.torch import load_file

import minilora
from minilora.quant.codebooks import NF4, dynamic_map

# PEFT 0.21.2 asks transformers for the old name of this property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# bitsandbytes compiles its generic decoder anew for every shape; the function inside means the same and starts at once.
generic_decode = _dequantize_4bit_compute.__wrapped__


def theirs(weight, blocksize=64, nested=False):
    return quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")


def ours(weight, blocksize=64, nested=False):
    return minilora.quantize(weight, minilora.QuantConfig(blocksize=blocksize, double_quant=nested))


def their_scales(state):
    """The fp32 scales of a bitsandbytes quant state, decoded as ``dequantize_4bit`` does it."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def their_values(packed, state):
    """What ``dequantize_4bit`` means, by bitsandbytes' generic code, in the dtype of the weight.

    Its C++ kernels are not asked: the one for AVX512 is wrong where a row is no multiple of the blocksize.
    """
    shape = tuple(state.shape)
    code = _get_4bit_code("nf4", torch.device("cpu"))
    flat = generic_decode(
        packed.reshape(-1), their_scales(state), code, state.blocksize, (math.prod(shape),), state.dtype
    )
    return flat.reshape(shape)


def mathematics(quantized):
    """Level times scale, element by element, from the definition alone."""
    codes = torch.stack([quantized.packed.view(-1) >> 4, quantized.packed.view(-1) & 15], 1).flatten().long()
    count = quantized.shape.numel()
    levels = torch.tensor(NF4.levels, dtype=torch.float32)[codes[:count]]
    block = torch.arange(count) // quantized.blocksize
    return (levels * quantized.scales()[block]).to(quantized.dtype).view(quantized.shape)


def same_bits(a, b):
    """Equal to the bit, so that 0.0 and -0.0 differ and shapes and dtypes count."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


# What is quantized


def random_weight(shape, scale, dtype, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    top = torch.finfo(dtype).max
    return values.clamp(-top, top).to(dtype)


shapes = (
    st.integers(1, 700).map(lambda n: (n,))
    | st.tuples(st.integers(1, 40), st.integers(1, 200))
    | st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 70))
    | st.sampled_from(
        [(1,), (2,), (63,), (64,), (65,), (129,), (1, 1), (48, 80), (16, 1), (33, 64), (64, 129), (8, 4096)]
    )
)


@st.composite
def weights(draw):
    shape = draw(shapes)
    dtype = draw(st.sampled_from(DTYPES))
    decades = (-4, 4) if dtype == torch.float16 else (-10, 10)
    weight = random_weight(shape, 10.0 ** draw(st.integers(*decades)), dtype, draw(st.integers(0, 2**16)))
    flat = weight.reshape(-1)
    for _ in range(draw(st.integers(0, 2))):  # zero blocks, and zeros across blocks
        start = draw(st.integers(0, len(flat) - 1)) // 64 * 64
        flat[start : start + draw(st.sampled_from([1, 64, 100]))] = 0
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        return weight.T.contiguous().T if weight.dim() == 2 else weight
    return torch.stack([weight, weight + 1], -1)[..., 0] if layout == "strided" else weight


def on_thresholds(absmax, blocksize, seed):
    """One block whose scaled values lie on the thresholds between levels and on their neighbours among floats."""
    midpoints, _ = NF4.thresholds()
    up, down = (torch.nextafter(midpoints, torch.full_like(midpoints, end)) for end in (math.inf, -math.inf))
    inner = torch.cat([midpoints, up, down]) * absmax
    inner = torch.cat([inner, torch.nextafter(inner, torch.zeros(1)), torch.nextafter(inner, inner.sign() * math.inf)])
    chosen = torch.randperm(len(inner), generator=torch.Generator().manual_seed(seed))[: blocksize - 1]
    return torch.cat([torch.tensor([absmax]), inner[chosen]])


def threshold_blocks(tails):
    """Blocks of 64 such values, the last of them cut short by ``tails``: bitsandbytes has another rule there."""
    return st.builds(
        lambda scales, seed, cut: torch.cat([on_thresholds(x, 64, seed + i) for i, x in enumerate(scales)])[
            : -cut or None
        ],
        st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=8),
        st.integers(0, 2**16),
        tails,
    )


many = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
blocksizes = st.sampled_from(BLOCKSIZES)


def check_storage(weight, blocksize):
    packed, state = theirs(weight, blocksize)
    found = ours(weight, blocksize)
    assert same_bits(found.packed.reshape(-1), packed.reshape(-1))
    assert same_bits(found.absmax, state.absmax)


def check_nested_storage(weight, blocksize):
    packed, state = theirs(weight, blocksize, nested=True)
    found = ours(weight, blocksize, nested=True)
    assert same_bits(found.packed.reshape(-1), packed.reshape(-1))
    assert same_bits(found.nested_offset, state.offset.reshape(1))
    assert same_bits(found.nested_absmax, state.state2.absmax)
    assert same_bits(found.absmax, state.absmax)


def check_values(weight, blocksize, nested):
    found = ours(weight, blocksize, nested)
    values = found.dequantize()
    assert same_bits(values, their_values(*theirs(weight, blocksize, nested)))
    assert values.shape == weight.shape and values.dtype == weight.dtype


# Storage


@many
@given(weight=weights(), blocksize=blocksizes)
def test_codes_and_absmax_are_bit_equal(weight, blocksize):
    check_storage(weight, blocksize)


@many
@given(weight=threshold_blocks(st.just(0)))
def test_codes_of_values_on_thresholds_are_bit_equal(weight):
    check_storage(weight, 64)


@many
@given(weight=threshold_blocks(st.integers(1, 62)))
def test_codes_of_values_on_thresholds_in_a_short_last_block_are_bit_equal(weight):
    check_storage(weight, 64)


@many
@given(weight=weights(), blocksize=blocksizes)
def test_nested_codes_scales_and_offset_are_bit_equal(weight, blocksize):
    check_nested_storage(weight, blocksize)


@many
@given(weight=weights(), blocksize=blocksizes)
def test_dequantized_values_are_bit_equal(weight, blocksize):
    check_values(weight, blocksize, nested=False)


@many
@given(weight=weights(), blocksize=blocksizes)
def test_dequantized_values_are_bit_equal_with_nested_scales(weight, blocksize):
    check_values(weight, blocksize, nested=True)


@many
@given(weight=threshold_blocks(st.integers(0, 62)))
def test_dequantized_values_on_thresholds_are_bit_equal(weight):
    check_values(weight, 64, nested=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [64 * 256, 64 * 257, 64 * 257 + 1, 300_001])
def test_storage_and_values_are_bit_equal_where_nested_blocks_and_chunks_end(count, nested, dtype):
    weight = random_weight((count,), 0.02, dtype, seed=count)
    (check_nested_storage if nested else check_storage)(weight, 64)
    check_values(weight, 64, nested)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zeros_are_bit_equal(dtype, nested):
    weight = torch.zeros(3, 64, dtype=dtype)
    check_storage(weight, 64)
    check_values(weight, 64, nested)


@pytest.mark.parametrize("value", [1e-37, 1e-38, 1e-39, 1e-44, 3e38])
@pytest.mark.parametrize("count", [64, 128, 65])
def test_extreme_values_are_bit_equal(value, count):
    weight = torch.linspace(-1, 1, count) * value
    check_storage(weight, 64)
    check_values(weight, 64, nested=False)


def test_every_half_precision_value_between_the_levels_is_bit_equal():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[torch.isfinite(values) & (values.abs() <= 1)]
        values = values[: len(values) // 63 * 63].view(-1, 63)
        check_storage(torch.cat([values, torch.ones(len(values), 1, dtype=dtype)], 1), 64)


def test_code_tables_are_bit_equal():
    assert same_bits(NF4.table(), _get_4bit_code("nf4", torch.device("cpu")))


def test_dynamic_map_is_bit_equal():
    assert same_bits(dynamic_map(), create_dynamic_map())


# Values where the AVX512 kernel of bitsandbytes is wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(48, 80), (7, 96), (64, 576), (5, 100), (33, 130)])
def test_values_of_rows_that_no_blocksize_divides_are_level_times_scale(shape, nested, dtype):
    """Blocks run across rows. bitsandbytes' AVX512 kernel starts a block with each row; its generic code does not."""
    weight = random_weight(shape, 1.0, dtype, seed=1) * torch.linspace(0.1, 4, shape[0]).unsqueeze(1).to(dtype)
    quantized = ours(weight, 64, nested)
    assert same_bits(quantized.dequantize(), mathematics(quantized))
    widest_gap = (NF4.table()[1:] - NF4.table()[:-1]).max().item()
    bound = quantized.scales()[torch.arange(weight.numel()) // 64].view(shape) * widest_gap / 2
    slack = 1.02 if nested else 1.01  # rounding to the dtype, and of the scales
    loss = (quantized.dequantize().float() - weight.float()).abs()
    assert (loss <= bound * slack + bound.max() * (0.05 if nested else 1e-3)).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (8, 128), (3, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_whole_rows_are_those_of_the_compiled_kernel(shape, nested, dtype):
    weight = random_weight(shape, 0.5, dtype, seed=2)
    packed, state = theirs(weight, 64, nested)
    expected = bnb.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(ours(weight, 64, nested).dequantize(), expected)


# Layers


def their_layer(linear, nested, compute_dtype=torch.float32):
    """``linear`` as a bitsandbytes layer in train mode (in eval mode some processors repack the codes for bf16)."""
    options = {"compute_dtype": compute_dtype, "compress_statistics": nested, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").train()


def our_layer(linear, nested):
    return minilora.QuantLinear.from_linear(copy.deepcopy(linear), minilora.QuantConfig(double_quant=nested))


LAYERS = [(64, 48), (128, 96), (192, 10), (1024, 33)]


@pytest.fixture(params=LAYERS, ids=str)
def layers(request):
    """``layers(nested)``: QuantLinear, Linear4bit and an input, of equal weights."""
    inside, out = request.param
    torch.manual_seed(inside)
    linear = torch.nn.Linear(inside, out)

    def make(nested):
        return our_layer(linear, nested), their_layer(linear, nested), torch.randn(3, 5, inside)

    return make


def close(found, wanted, relative=1e-6):
    return (found - wanted).norm() <= relative * wanted.norm() and found.dtype == wanted.dtype


@pytest.mark.parametrize("nested", [False, True])
def test_layers_hold_equal_bytes(layers, nested):
    ours_, theirs_, _ = layers(nested)
    state = theirs_.weight.quant_state
    assert ours_.codes.reshape(-1).equal(theirs_.weight.data.reshape(-1))
    assert same_bits(ours_.quantized().scales(), their_scales(state))


@pytest.mark.parametrize("nested", [False, True])
def test_forward_equals_linear4bit(layers, nested):
    ours_, theirs_, x = layers(nested)
    assert close(ours_(x), theirs_(x).detach())


@pytest.mark.parametrize("nested", [False, True])
def test_gradient_to_x_equals_linear4bit(layers, nested):
    ours_, theirs_, x = layers(nested)
    gradients = []
    for layer in (ours_, theirs_):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert close(*gradients) and gradients[1].norm() > 0


@pytest.mark.parametrize("nested", [False, True])
def test_bf16_forward_equals_linear4bit_to_bf16(layers, nested):
    ours_, theirs_, x = layers(nested)
    theirs_.compute_dtype = torch.bfloat16
    x = x.to(torch.bfloat16)
    assert close(ours_(x), theirs_(x).detach(), relative=1e-2)


# Whole models

TARGETS = ["q_proj", "v_proj"]
SETTINGS = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}


def to_4bit(model, nested=False):
    """bitsandbytes layers in place of all linear ones but the head, as transformers puts them on loading."""
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, their_layer(module, nested))
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


@pytest.fixture
def bases(build_model):
    """``bases(nested)``: the tiny Llama (rows of whole blocks) quantized by minilora and by bitsandbytes."""

    def make(nested=False):
        config = minilora.QuantConfig(double_quant=nested)
        quantized = minilora.quantize_model(build_model("llama", intermediate=128), config)
        return quantized, to_4bit(build_model("llama", intermediate=128), nested)

    return make


def adapted(library, model):
    torch.manual_seed(4)
    return library.get_peft_model(model, library.LoraConfig(**SETTINGS))


def train(model, ids, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model, ids):
    # With gradients on: without, bitsandbytes may take kernels that round to bf16.
    return model(input_ids=ids).logits.detach()


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_models_give_equal_logits(bases, token_ids, nested):
    ours_, theirs_ = bases(nested)
    torch.testing.assert_close(logits(ours_, token_ids), logits(theirs_, token_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_training_on_a_quantized_base_gives_equal_losses_and_adapters(bases, token_ids, tmp_path, nested):
    losses = {}
    for library, base in zip((minilora, peft), bases(nested), strict=True):
        model = adapted(library, base)
        losses[library.__name__] = train(model, token_ids)
        model.save_pretrained(tmp_path / library.__name__)
    assert losses["minilora"] == pytest.approx(losses["peft"], abs=1e-5) and losses["peft"][-1] < losses["peft"][0]
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("minilora", "peft"))
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("nested", [False, True])
def test_adapter_trained_by_peft_on_4bit_gives_equal_logits_on_our_nf4(bases, token_ids, tmp_path, nested):
    ours_, theirs_ = bases(nested)
    theirs_ = adapted(peft, theirs_)
    train(theirs_, token_ids)
    theirs_.save_pretrained(tmp_path)
    loaded = minilora.PeftModel.from_pretrained(ours_, tmp_path)
    plain = logits(bases(nested)[0], token_ids)
    torch.testing.assert_close(logits(loaded, token_ids), logits(theirs_, token_ids), rtol=0, atol=1e-5)
    assert (logits(loaded, token_ids) - plain).abs().max() > 0.01


@pytest.mark.parametrize("nested", [False, True])
def test_adapter_trained_by_us_on_nf4_gives_equal_logits_on_their_4bit(bases, token_ids, tmp_path, nested):
    ours_, theirs_ = bases(nested)
    ours_ = adapted(minilora, ours_)
    train(ours_, token_ids)
    ours_.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs_, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(ours_, token_ids), logits(loaded, token_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_parameters_are_counted_as_peft_counts_a_4bit_model(bases, capsys, nested):
    lines = []
    for library, base in zip((minilora, peft), bases(nested), strict=True):
        model = adapted(library, base)
        model.print_trainable_parameters()
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and lines[0].startswith("trainable params: 1,792 ||")


@pytest.mark.parametrize("nested", [False, True])
def test_parameters_of_the_documented_4bit_model_are_counted_as_documented(nested):
    """bitsandbytes.md, section 5: hidden 64, feed-forward 128, heads 4/2, vocabulary 64, no biases, r=4 on q and v."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    model = minilora.quantize_model(LlamaForCausalLM(config), minilora.QuantConfig(double_quant=nested))
    assert adapted(minilora, model).get_nb_trainable_parameters() == (1_792, 84_032)
    theirs_ = adapted(peft, to_4bit(LlamaForCausalLM(config), nested))
    assert theirs_.get_nb_trainable_parameters() == (1_792, 84_032)
