"""The byte model that comes with the package: its weights, its texts, and that the script which made it learns."""

import math
import os
import re
import subprocess
import sys
import time
import zlib

import pytest
import torch

from minilora.data.encoding import IGNORED
from minilora.errors import CheckpointError, ConfigError, DataError, TrainingError, WriteError
from minilora.files.parse import tensor_bytes
from minilora.lab import byte_model as lab
from minilora.lab.byte_model import model as models
from minilora.lab.byte_model import texts

pytest.importorskip("transformers")

from minilora.lab.byte_model import train as training  # it needs the model's library


@pytest.fixture(scope="module")
def model():
    return lab.byte_model()


# ---- the weights


def test_it_loads_within_a_second_and_is_small(model):
    begun = time.process_time()
    again = lab.byte_model()
    assert time.process_time() - begun < 1
    assert 700_000 < again.num_parameters() < 900_000 and models.WEIGHTS.stat().st_size < 1_900_000
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_head_is_the_embedding_and_some_layers_are_not_square(model):
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (64, 128)


def test_every_parameter_comes_from_the_file(model):
    stored, about = models.read_weights(models.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert stored.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].float()), name
    assert about["license"] == "CC0-1.0" and int(about["steps"]) > 1000
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", about["python"])


def test_it_predicts_prose_that_it_has_not_read(model):
    """1.55 bits a byte on Python 3.11; a uniform guess has 8."""
    text = lab.docs(held_out=True)[:24_000]
    found = training.bits_per_byte(model, text)
    assert found < 1.7
    fresh = training.bits_per_byte(lab.byte_model(seed=0, pretrained=False), text)
    assert fresh > 8


def test_what_it_has_read_helps_with_code(model):
    found = training.bits_per_byte(model, lab.code(held_out=True)[:24_000])
    assert found < 2.2


def test_it_writes_words(model):
    """Of the words in a greedy answer of a hundred bytes, most stand in the docs."""
    begin = "\n\nReturn the number of "
    made = model.generate(torch.tensor([lab.encode(begin)]), max_new_tokens=100, do_sample=False)
    answer = lab.decode(made[0].tolist()).removeprefix(begin)
    words, known = re.findall(r"[a-z]+", answer.lower())[:-1], set(re.findall(rb"[a-z]+", lab.docs().lower()))
    assert len(words) >= 10 and sum(word.encode() in known for word in words) >= 0.8 * len(words), answer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_round_the_weights_only(model, dtype):
    other = lab.byte_model(dtype)
    assert {parameter.dtype for parameter in other.parameters()} == {dtype} == {other.config.dtype}
    angles, exact = other.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    assert torch.equal(angles, exact) and angles.dtype == torch.float32
    ids = torch.tensor([lab.encode("Return a list of the names.")])
    gap = (other(input_ids=ids).logits.double() - model(input_ids=ids).logits.double()).abs().max()
    assert gap < (1e-4 if dtype == torch.float64 else 0.5)


def test_fresh_weights_follow_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (lab.byte_model(seed=seed, pretrained=False) for seed in (1, 1, 2))
    lab.byte_model()
    assert torch.equal(torch.get_rng_state(), before)
    weights = [each.model.layers[3].mlp.up_proj.weight for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    drawn = lab.byte_model(pretrained=False).model.layers[3].mlp.up_proj.weight  # from torch's own generator
    assert not torch.equal(torch.get_rng_state(), before) and not torch.equal(drawn, weights[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 3}, "seed=3: the weights come from a file"),
        ({"seed": -1, "pretrained": False}, "seed=-1"),
        ({"dtype": torch.int8}, "dtype=torch.int8: wanted a floating one"),
        ({"dtype": "float32"}, "dtype=float32"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        lab.byte_model(**options)


def other_weights(change):
    stored = dict(models.read_weights(models.WEIGHTS)[0])
    change(stored)
    return tensor_bytes(stored, {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: models.WEIGHTS.read_bytes()[:-1000], "model.safetensors"),
        (lambda: other_weights(lambda stored: stored.pop("model.norm.weight")), "model.norm.weight has shape nothing"),
        (lambda: other_weights(lambda stored: stored.update(extra=torch.zeros(3))), "extra has shape (3,)"),
        (
            lambda: other_weights(lambda stored: stored.update({"model.norm.weight": torch.zeros(127)})),
            "model.norm.weight has shape (127,), and CONFIG asks for (128,)",
        ),
        (
            lambda: other_weights(lambda stored: stored.update({"model.norm.weight": torch.full((128,), math.nan)})),
            "model.norm.weight holds NaN",
        ),
    ],
    ids=["cut off", "missing", "extra", "shape", "nan"],
)
def test_a_damaged_file_is_refused(tmp_path, monkeypatch, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content())
    monkeypatch.setattr(models, "WEIGHTS", path)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        lab.byte_model()


# ---- the texts


def test_texts_are_the_same_every_time_and_have_a_small_part_held_out():
    made = [lab.docs(held_out=True), lab.code(held_out=True), lab.code()]
    texts._sources.cache_clear()
    texts._docs.cache_clear()
    assert [lab.docs(held_out=True), lab.code(held_out=True), lab.code()] == made
    for held, rest in ((made[0], lab.docs()), (made[1], made[2])):
        assert 20_000 < len(held) < len(rest) / 8 and models.PAD_ID not in held + rest
        assert held.decode() not in rest.decode()


def test_no_paragraph_of_the_docs_is_in_both_parts_or_twice():
    held, rest = ([b" ".join(part.split()) for part in lab.docs(held_out).split(b"\n\n")] for held_out in (True, False))
    assert len(held) > 200 and len(rest) > 10_000
    assert not set(held) & set(rest) and len(set(held)) == len(held) and len(set(rest)) == len(rest)


def test_held_out_code_is_of_modules_whose_docstrings_were_not_read():
    import fractions

    with open(fractions.__file__, "rb") as file:
        source = file.read()
    assert zlib.crc32(b"fractions") % texts.HELD_OUT_OF == 0
    assert source in lab.code(held_out=True) and source not in lab.code()
    first = b" ".join(fractions.Fraction.__doc__.encode().split(b"\n\n")[0].split())
    assert first in b" ".join(lab.docs(held_out=True).split()) and first not in b" ".join(lab.docs().split())


def test_code_has_comments_and_no_tests():
    code = lab.code()
    assert code.count(b"\n    # ") > 3_000 and b"class TestLoader" in code
    assert code.count(b"self.assertEqual(") < 20


def test_a_python_without_its_source_is_refused(tmp_path, monkeypatch):
    texts._sources.cache_clear()
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    with pytest.raises(DataError, match="no source of the standard library"):
        lab.code()


def test_facts_are_random_lines_with_keys_of_their_own():
    lines = lab.facts(3000, seed=7)
    assert lines == lab.facts(3000, seed=7) != lab.facts(3000, seed=8)
    assert len({line.prompt for line in lines}) == 3000
    assert all(re.fullmatch(rb"[a-z]{5} is ", line.prompt) for line in lines)
    assert all(re.fullmatch(rb"[0-9a-f]{8}\n", line.answer) for line in lines)
    ones = sum(int(line.answer, 16).bit_count() for line in lines)
    assert abs(ones / (3000 * texts.FACT_BITS) - 0.5) < 4 * 0.5 / math.sqrt(3000 * texts.FACT_BITS)


def test_sums_are_right_and_their_parts_share_no_line():
    rest, held = lab.sums(7085, seed=1), lab.sums(1015, seed=1, held_out=True)
    assert len({*rest, *held}) == 8100 == len(rest) + len(held)
    for line in rest + held:
        a, b = map(int, line.prompt.removesuffix(b"=").split(b"+"))
        assert line.answer == str(a + b).encode() + b"\n" and {a, b} <= set(range(10, 100))
    assert lab.sums(50, seed=2) == lab.sums(50, seed=2) != lab.sums(50, seed=3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lab.facts(0, seed=1), "count=0"),
        (lambda: lab.facts(3, seed=-1), "seed=-1"),
        (lambda: lab.sums(7086, seed=1), "count=7086: wanted a whole number from 1 to 7085"),
        (lambda: lab.sums(1016, seed=1, held_out=True), "from 1 to 1015"),
        (lambda: lab.text_examples(b"abc", 1), "length=1"),
    ],
)
def test_what_cannot_be_made_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# ---- examples


def test_a_text_is_cut_without_gap_and_every_token_is_learnt():
    text = bytes(range(1, 256)) * 2
    examples = lab.text_examples(text, 37)
    assert len(examples) == len(text) // 37 and {len(example.input_ids) for example in examples} == {37}
    assert b"".join(bytes(example.input_ids) for example in examples) == text[: 37 * len(examples)]
    assert all(example.labels == example.input_ids for example in examples)
    assert len(lab.text_examples(text[:37], 37)) == 1
    with pytest.raises(DataError, match="36 bytes and an example 37"):
        lab.text_examples(text[:36], 37)


def test_of_a_line_only_the_answer_is_learnt():
    lines = [*lab.facts(3, seed=1), *lab.sums(3, seed=1)]
    for line, example in zip(lines, lab.line_examples(lines), strict=True):
        assert bytes(example.input_ids) == line.prompt + line.answer
        assert set(example.labels[: len(line.prompt)]) == {IGNORED}
        assert bytes(example.labels[len(line.prompt) :]) == line.answer
        assert example.supervised == len(line.answer)


def test_encode_and_decode():
    assert lab.encode("aé") == lab.encode("aé".encode()) == [97, 0xC3, 0xA9]
    assert lab.decode([97, 0xC3, 0xA9]) == "aé" and lab.decode(torch.tensor([97, 0xC3])) == "a\ufffd"
    with pytest.raises(DataError, match="token 256: is no byte"):
        lab.decode([97, 256])
    with pytest.raises(DataError, match="token -100: is no byte"):
        lab.decode([-100, 97])


# ---- the script


def test_the_script_learns_and_writes_what_it_learnt(tmp_path, monkeypatch, capsys):
    held, rest = lab.docs(held_out=True)[:8192], lab.docs()
    monkeypatch.setattr(training, "docs", lambda held_out=False: held if held_out else rest)
    path = tmp_path / "small.safetensors"
    assert training.main(["--steps", "25", "--seed", "3", "--out", str(path)]) == 0
    losses = [float(found) for found in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] - 0.5
    stored, about = models.read_weights(path)
    model = lab.byte_model(seed=3, pretrained=False)
    fresh = training.bits_per_byte(model, held)
    models.fill(model, stored, path)
    learnt = training.bits_per_byte(model, held)
    assert learnt < fresh - 1 and about["held_out_bits_per_byte"] == f"{learnt:.4f}"
    assert (about["steps"], about["seed"]) == ("25", "3")


def test_equal_seeds_train_equal_models():
    one, same, other = (training.train(steps=2, seed=seed, say=lambda line: None)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.model.norm.weight, other.model.norm.weight)


def test_minutes_end_the_run():
    _, steps = training.train(minutes=0.01, say=lambda line: None)
    assert 1 <= steps < 60


def test_the_rate_rises_and_falls_to_nothing():
    rates = [training._share(gone / 200) for gone in range(201)]
    top = rates.index(max(rates))
    assert rates[0] > 0 and max(rates) == 1 and top == round(200 * training.WARMUP)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_bits_per_byte_is_the_cross_entropy(model):
    text = lab.docs(held_out=True)[:333]
    ids = torch.tensor([lab.encode(text[:166]), lab.encode(text[166:332])])
    logits = lab.byte_model(torch.float64)(input_ids=ids).logits[:, :-1]
    bits = -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean() / math.log(2)
    assert training.bits_per_byte(model, text, 166) == pytest.approx(float(bits), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"steps": 3, "minutes": 1}, {"steps": 0}, {"minutes": 0.0}, {"minutes": math.nan}]
)
def test_a_length_of_the_run_that_means_nothing_is_refused(options):
    with pytest.raises(ConfigError):
        training.train(**options)


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch):
    monkeypatch.setattr(training, "_step", lambda *given: math.inf)
    with pytest.raises(TrainingError, match="the loss is inf in step 1"):
        training.train(steps=3)


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *given: pytest.fail("trained"))
    for path in (tmp_path, tmp_path / "missing" / "file"):
        assert training.main(["--steps", "1", "--out", str(path)]) == WriteError.exit_code
        assert str(path) in capsys.readouterr().err


def test_the_package_is_imported_without_torch():
    source = "import sys, minilora.lab.byte_model; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], timeout=60).returncode == 0
