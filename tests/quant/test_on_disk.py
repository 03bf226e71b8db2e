"""Packed weights on disk in minilora's own layout: every codebook, own ones too, read without the code that made it."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

import minilora
import minilora.hf.quantizer  # which makes the own entry known to transformers
from minilora import Codebook, QuantConfig, quantize
from minilora.cli import main
from minilora.errors import CheckpointError, QuantizationError
from minilora.hf.packed import is_packed_folder, load_packed, packing_said, save_packed
from minilora.quant.codebooks import CODEBOOKS
from minilora.quant.on_disk import from_disk, to_disk
from minilora.quant.stack import quantize_stack
from tests.models import llama, moe

OWN = Codebook("my__sevenths", tuple(max(k, -7) / 7 for k in range(-8, 8)), "for a test")
SIGNED = Codebook("quarters", (-0.5, 0.0, 0.25, 1.0), "for a test", signed=True)
KINDS = [*(name for name in CODEBOOKS), OWN, SIGNED]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "name", kind))
@pytest.mark.parametrize("shape", [(5, 67), (32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_to_the_bit(kind, double, shape, dtype):
    torch.manual_seed(0)
    weight = quantize(torch.randn(shape).to(dtype), QuantConfig(kind, 32, double))
    again = from_disk(to_disk(weight), "w")
    assert (again.dtype, again.shape, again.book.levels) == (dtype, weight.shape, again.book.levels)
    assert torch.equal(again.book.table(), weight.book.table()) and again.book.signed == weight.book.signed
    assert torch.equal(again.packed, weight.packed) and again.packed.shape == weight.packed.shape
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_what_bitsandbytes_has_is_kept_as_it_does():
    weight = quantize(torch.randn(8, 64), QuantConfig("nf4"))
    assert any("bitsandbytes__nf4" in name for name in to_disk(weight))


def test_the_name_of_a_known_codebook_with_other_levels_is_refused(monkeypatch):
    tensors = to_disk(quantize(torch.randn(8, 64), QuantConfig(OWN)))
    other = Codebook(OWN.name, tuple(k / 16 for k in range(16)), "another")
    monkeypatch.setitem(CODEBOOKS, OWN.name, other)
    with pytest.raises(CheckpointError, match="was packed with other levels than the codebook 'my__sevenths' has here"):
        from_disk(tensors, "w")


def changed(tensors, **fields):
    name = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[name].tolist())) | fields
    return tensors | {name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: changed(t, bits=5), "says bits=5"),
        (lambda t: changed(t, bits=True), "says bits=True"),
        (lambda t: changed(t, bits=8), "holds 8 levels, its quant_state wants 256"),
        (lambda t: changed(t, signed=1), "signed=1"),
        (lambda t: changed(t, blocksize=48), "is not a state that minilora reads"),
        (lambda t: changed(t, quant_type="nf4"), "is not a state that minilora reads"),
        (lambda t: changed(t, shape=[9, 64]), "bytes of codes"),
        (lambda t: t | {".quant_map": t[".quant_map"] * 2}, "outside"),
        (lambda t: t | {".quant_map": t[".quant_map"] * torch.nan}, "outside"),
        (lambda t: t | {"": t[""][:-1]}, "bytes of codes"),
        (lambda t: t | {".absmax": t[".absmax"] * torch.inf}, "NaN or infinity"),
        (lambda t: {name: held for name, held in t.items() if name != ".absmax"}, ".absmax: is missing"),
        (lambda t: t | {".quant_state.minilora__other": t[".quant_state.minilora__nf3x"]}, "2 quant_state tensors"),
    ],
)
def test_damage_is_refused_by_name(damage, words):
    book = Codebook("nf3x", CODEBOOKS["nf3"].levels, "as nf3, under a name that is not known")
    tensors = to_disk(quantize(torch.randn(8, 64), QuantConfig(book)))
    assert torch.isfinite(from_disk(tensors, "w").dequantize()).all()
    with pytest.raises(CheckpointError, match=words):
        from_disk(damage(tensors), "w")


def test_what_is_no_matrix_is_refused():
    with pytest.raises(QuantizationError, match="3 dimensions"):
        to_disk(quantize(torch.randn(2, 8, 64), QuantConfig("nf3")))


@pytest.mark.parametrize("kind", ["nf3", "int8", OWN], ids=lambda kind: getattr(kind, "name", kind))
def test_a_packed_model_comes_back(kind, tmp_path, ids):
    model = minilora.quantize_model(llama(intermediate_size=96), QuantConfig(kind, 32, True))
    save_packed(model, tmp_path / "packed")
    folder = str(tmp_path / "packed")
    said = packing_said(folder)
    assert is_packed_folder(folder) and (said.blocksize, said.double_quant) == (32, True)
    again = load_packed(folder, torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
    adapted = minilora.get_peft_model(again, minilora.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    adapted(ids).logits.sum().backward()
    with pytest.raises(minilora.errors.ConfigError, match=r"open it with minilora\.hf\.load_model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_codebook_of_ones_own_on_the_command_line(tmp_path, capsys, model_folder):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from minilora import Codebook, register_codebook\n"
        "register_codebook(Codebook('ninths', tuple((k - 8) / 8 for k in range(1, 17)), 'for a test'))\n"
    )
    try:
        words = ["--model", model_folder, "--out", str(tmp_path / "packed"), "--plugin", str(plugin)]
        assert main(["quantize", *words, "--format", "ninths"]) == 0
    finally:
        CODEBOOKS.pop("ninths", None)
    assert main(["generate", "--model", str(tmp_path / "packed"), "--max-new-tokens", "3", "hi"]) == 0
    assert main(["info", str(tmp_path / "packed")]) == 0
    said = capsys.readouterr().out
    assert "ninths" in said and "the layout is minilora's own" in said
    assert main(["plan", "--model", str(tmp_path / "packed"), "--no-measure", "--batch", "1", "--seq", "16"]) == 0


# ---- experts


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("shape", "whole"), [((3, 8, 24), True), ((4, 5, 7), False)])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "nf3"])
def test_experts_come_back_to_the_bit(kind, shape, whole, double):
    torch.manual_seed(0)
    weight = quantize_stack(torch.randn(shape), QuantConfig(kind, 64, double))
    tensors = to_disk(weight)
    theirs = kind in ("nf4", "fp4") and whole
    assert any("bitsandbytes__" in name for name in tensors) == theirs
    again = from_disk(tensors, "w")
    assert again.shape == weight.shape and again.is_whole == whole == weight.is_whole
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("experts", [[3, 5, 7], [4, 5, 40], [4, 0, 7], "4", [4, 5], [True, 5, 7]], ids=str)
def test_experts_that_cannot_be_in_the_file_are_refused(experts):
    tensors = to_disk(quantize_stack(torch.randn(4, 5, 7), QuantConfig("nf4")))
    with pytest.raises(CheckpointError, match=r"^w: found \[4, 64\] as experts of .*pack the dense model again"):
        from_disk(changed(tensors, experts=experts), "w")


def test_experts_of_bitsandbytes_whose_blocks_cross_are_refused():
    """It packs a 3-D parameter as one row of numbers, so a block may belong to two experts."""
    flat = quantize(torch.randn(4, 35), QuantConfig("nf4"))
    tensors = changed(to_disk(flat), shape=[4, 5, 7])
    with pytest.raises(CheckpointError, match="blocks of 64 that cross from one into the next"):
        from_disk(tensors, "w")


@pytest.mark.parametrize(("kind", "blocksize", "double"), [("nf4", 64, True), ("fp4", 64, False), ("nf3", 32, True)])
def test_a_packed_mixture_is_read_back_and_streamed(tmp_path, kind, blocksize, double):
    ids = torch.arange(14).view(2, 7)
    model = moe(hidden_size=32, moe_intermediate_size=20)
    model.save_pretrained(tmp_path / "dense")
    config = QuantConfig(kind, blocksize, double)
    with torch.no_grad():
        wanted = minilora.quantize_model(model, config)(ids).logits
        save_packed(model, tmp_path / "packed")
        said = packing_said(str(tmp_path / "packed"))
        assert (said.format.name, said.blocksize, said.double_quant) == (kind, blocksize, double)
        again = load_packed(str(tmp_path / "packed"), torch.float32)
        assert torch.equal(again(ids).logits, wanted)
        quantized = minilora.hf.NF4Config(kind, blocksize, double)
        streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quantized)
        assert torch.equal(streamed(ids).logits, wanted)
        streamed.save_pretrained(tmp_path / "again")
        assert torch.equal(load_packed(str(tmp_path / "again"), torch.float32)(ids).logits, wanted)
        streamed.dequantize()
        torch.testing.assert_close(streamed(ids).logits, wanted)
        streamed.save_pretrained(tmp_path / "plain")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert torch.equal(plain(ids).logits, streamed(ids).logits)
