"""What a probe measures, against models that are built so; and ``probe.json`` as a file that anybody may have written."""

import copy
import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch

import minilora
from minilora.cli import main
from minilora.errors import CheckpointError, MiniLoraError, StateError
from minilora.lora.slots import adapters_of
from minilora.proof import measure, read_probe, seal_folder, verify_in, write_probe
from minilora.proof.curves import BASE_MAGNITUDES, NO_MAGNITUDES, OVER_RANK, RAW, applied, ways
from minilora.proof.inside import answers_of
from minilora.proof.probe import PROBE_FILE
from minilora.proof.verdict import distance, effect, exact_for, fitted, judge, told_effect
from minilora.quant.gguf.formats import FORMATS
from tests.gguf_llama import write_model
from tests.models import byte_tokenizer
from tests.proof.conftest import adapted, answers_along, base

IDS = torch.tensor([[5, 60, 7, 200, 33]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def along(model, name):
    (way,) = [way for way in ways(model) if way.curve.name == name]
    with applied(model, way):
        return logits(model)


def changed(model, change):
    """A copy of the model with ``change(path, layer)`` done to each adapted layer."""
    other = copy.deepcopy(model)
    for path, slot in adapters_of(other).slots.items():
        change(path, slot.kept["default"])
    return other


@pytest.mark.parametrize("fields", [{}, {"use_rslora": False, "alpha_pattern": {"q_proj": 3.0}}])
def test_a_curve_is_the_model_that_is_built_so(fields):
    model = adapted(**fields)
    torch.testing.assert_close(along(model, "base"), logits(base()), rtol=0, atol=0)
    torch.testing.assert_close(along(model, "adapted"), logits(model), rtol=0, atol=0)
    half = changed(model, lambda path, layer: layer.lora_B.data.mul_(0.5))
    torch.testing.assert_close(along(model, "scale 0.5"), logits(half), rtol=1e-4, atol=1e-5)
    without = changed(model, lambda path, layer: layer.lora_B.data.zero_() if "down_proj" in path else None)
    torch.testing.assert_close(along(model, "down_proj left out"), logits(without), rtol=1e-4, atol=1e-5)
    over = changed(model, lambda path, layer: layer.lora_B.data.mul_(12 / 3 / layer.scaling))
    torch.testing.assert_close(along(model, OVER_RANK), logits(over), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_every_variant_has_its_curves(fields):
    model = adapted(**fields)
    before = logits(model)
    torch.testing.assert_close(along(model, "base"), logits(base()), rtol=0, atol=0)
    kinds = {way.curve.name: along(model, way.curve.name) for way in ways(model)}
    assert len({round(float(value.sum()), 3) for value in kinds.values()}) == len(kinds)
    assert (RAW in kinds) == ("init_lora_weights" in fields)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@torch.no_grad()
def with_factors(model):
    """The base with ``scaling * B A`` of the model's file added to its weights, and nothing else of the adapter."""
    plain = base()
    for path, slot in adapters_of(model).slots.items():
        layer = slot.kept["default"]
        plain.get_submodule(path).weight += layer.scaling * layer.lora_B @ layer.lora_A
    return plain


def test_raw_factors_of_pissa_are_those_of_the_file():
    model = adapted(init_lora_weights="pissa")
    plain = with_factors(model)
    torch.testing.assert_close(along(model, RAW), logits(plain), rtol=1e-3, atol=1e-3)


def test_dora_without_its_trained_magnitudes():
    model = adapted(use_dora=True)
    plain = with_factors(model)
    torch.testing.assert_close(along(model, NO_MAGNITUDES), logits(plain), rtol=1e-3, atol=1e-3)
    for path in adapters_of(model).slots:
        weight, norms = plain.get_submodule(path).weight, base().get_submodule(path).weight.norm(dim=1, keepdim=True)
        weight.data *= norms / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(along(model, BASE_MAGNITUDES), logits(plain), rtol=1e-3, atol=1e-3)


def test_what_transformers_leaves_of_dora_is_told(tmp_path):
    pytest.importorskip("peft")
    base().save_pretrained(tmp_path / "base")
    model = adapted(use_dora=True)
    model.save_pretrained(tmp_path / "a")
    seal_folder(model, byte_tokenizer(), tmp_path / "a", ["hello there"], name="tiny")
    assert verify_in(tmp_path / "a", "peft", str(tmp_path / "base")).kind == "right"
    found = verify_in(tmp_path / "a", "transformers", str(tmp_path / "base"))
    assert found.kind == "right" or (found.kind == "misread" and BASE_MAGNITUDES in found.text)


def test_a_probe_asks_where_base_and_adapted_model_differ(sealed):
    probe = sealed.probe
    assert effect(probe) > 0.5 and 8 <= len(probe.questions) <= 12 and len(probe.chats) == 2
    assert probe.chats[0].turns == ({"role": "user", "content": "hello there"},)
    for question in probe.questions:
        with torch.no_grad():
            own = torch.log_softmax(sealed.model(torch.tensor([question.ids])).logits[0, -1], -1)
        row = question.log_probs[probe.place("adapted")]
        assert set(own.topk(20).indices.tolist()) <= set(question.tokens)
        assert max(abs(float(own[token]) - value) for token, value in zip(question.tokens, row, strict=True)) < 1e-3


def test_measuring_is_the_same_again_and_leaves_the_model(sealed):
    model, tokenizer = adapted().train(), byte_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scalings = [module.scaling for module in model.modules() if hasattr(module, "scaling")]
    one, two = (measure(model, tokenizer, ["hello there"]) for _ in range(2))
    assert one == two and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.scaling for module in model.modules() if hasattr(module, "scaling")] == scalings
    assert not any(module._forward_hooks for module in model.modules())


NATS = {32: 0.15, 256: 0.2}


@pytest.mark.parametrize(
    ("dtype", "packing", "nats"),
    [
        ("float32", "packed to Q4_1, blocks of 32", 0.15),  # as a model says it that was read from a GGUF file
        *(
            ("float32", f"packed to {form.name}, blocks of {form.weights}", 0.15 if form.weights == 32 else 0.2)
            for form in FORMATS.values()
        ),
        ("float32", "packed to Q4_K-Q6_K, blocks of 256", 0.2),
        ("bfloat16", "", 0.07),
        ("float32", "packed to nf4, blocks of 64", 0.02),
        ("float32", "", 0.02),
    ],
)
def test_how_near_is_the_same_hangs_on_how_the_base_lay_in_memory(sealed, dtype, packing, nats):
    assert exact_for(replace(sealed.probe, dtype=dtype, packing=packing)) == nats


def test_each_curve_is_judged_as_what_it_is(sealed):
    for curve in sealed.probe.curves:
        found = judge(sealed.probe, answers_along(sealed.probe, curve.name))
        wanted = {"base": "not applied", "adapted": "right"}.get(curve.name, curve.kind)
        assert found.kind == wanted and (curve.kind == "scale" or curve.name in found.text)
        if curve.kind == "scale":
            assert found.scale == pytest.approx(curve.scale, abs=0.011)


def test_a_distance_is_the_root_mean_square_weighted_by_probability(sealed):
    probe, at = sealed.probe, sealed.probe.place("adapted")
    shifted = [{t: v - 0.25 for t, v in answer.items()} for answer in answers_along(probe, "adapted", 10)]
    short = [dict(zip(q.tokens, q.log_probs[at], strict=True)) for q in probe.questions]
    wanted = 0.0
    for answer, own in zip(shifted, short, strict=True):
        least, total, weights = min(answer.values()), 0.0, 0.0
        for token, value in own.items():
            theirs = answer.get(token, least)
            if token in answer or value > least:
                weight = (2.718281828459045**theirs + 2.718281828459045**value) / 2
                total, weights = total + weight * (theirs - value) ** 2, weights + weight
        wanted += total / weights / len(short)
    assert distance(probe, shifted, at) == pytest.approx(wanted**0.5, rel=1e-6)
    assert fitted(probe, answers_along(probe, "adapted"))[1] == 0


def test_another_base_is_told_from_another_adapter_where_the_base_can_be_asked(sealed):
    probe, tokenizer = sealed.probe, byte_tokenizer()
    other = answers_along(measure(adapted(5), tokenizer, ["hello there"]), "adapted")
    count = min(len(other), len(probe.questions))
    strange = [*other[:count], *answers_along(probe, "adapted")[count:]]
    assert judge(probe, strange, answers_along(probe, "base")).kind == "another adapter"
    assert judge(probe, strange, strange).kind == "another base"
    assert judge(probe, strange).kind == "another adapter or base"


def beside(model, noise, name):
    """What a server answers that computes as a curve says, on a base whose weights are a little off."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in other.parameters():
            if not weight.requires_grad and weight.dim() == 2:
                weight += torch.randn(weight.shape, generator=draw) * noise * weight.std()
    (way,) = [way for way in ways(other) if way.curve.name == name]
    with applied(other, way):
        return answers_of(other, probe_of(model).questions)


@functools.cache
def probe_of(model):
    return measure(model, byte_tokenizer(), ["hello there"], adapter="0" * 64, name="tiny")


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03])
def test_a_layer_that_is_left_out_is_seen_on_another_packing_of_the_base(sealed, noise):
    for name in ("q_proj left out", "v_proj left out", "down_proj left out", "mlp left out"):
        found = judge(sealed.probe, beside(sealed.model, noise, name))
        assert (found.kind, found.code) == ("misread", 1) and name in found.text
    assert judge(sealed.probe, beside(sealed.model, noise, "adapted")).kind in ("right", "another packing")


def test_a_layer_that_does_little_is_seen_where_nothing_else_explains_what_is_off():
    model = adapted()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 0.012 if "q_proj" in name and "lora_B" in name else 1
    probe, answers = probe_of(model), beside(model, 0, "q_proj left out")
    assert 0.005 < distance(probe, answers, probe.place("adapted")) < exact_for(probe)
    assert judge(probe, answers).kind == "misread" and judge(probe, beside(model, 0, "adapted")).kind == "right"


def test_answers_that_the_adapter_does_not_move_tell_nothing(sealed):
    """Of three questions out of twelve an answer came, and base and adapted model say the same there."""
    rows = [
        q.log_probs if at > 2 else (q.log_probs[0],) * len(q.log_probs) for at, q in enumerate(sealed.probe.questions)
    ]
    questions = tuple(replace(q, log_probs=row) for q, row in zip(sealed.probe.questions, rows, strict=True))
    probe = replace(sealed.probe, questions=questions)
    assert effect(probe) > 0.3
    for name in ("base", "adapted"):
        answers = [answer if at < 3 else {} for at, answer in enumerate(answers_along(probe, name))]
        assert (judge(probe, answers).kind, judge(probe, answers).code) == ("unknown", 2)


def test_an_effect_that_is_too_small_is_said(tmp_path):
    model, tokenizer = adapted(size=1e-4), byte_tokenizer()
    model.save_pretrained(tmp_path)
    said = []
    probe = seal_folder(model, tokenizer, tmp_path, say=said.append)
    assert "cannot be told" in said[0] and said[0] == told_effect(probe)
    found = judge(probe, answers_along(probe, "adapted"))
    assert (found.kind, found.code) == ("unknown", 2)


def test_of_two_active_adapters_no_probe_is_made():
    model = adapted()
    model.add_adapter("other", minilora.LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj"]))
    model.set_adapter(["default", "other"])
    with pytest.raises(StateError, match="one active adapter"):
        measure(model, byte_tokenizer())


# ---- the file


def content_of(sealed):
    return json.loads((sealed.folder / PROBE_FILE).read_text())


def read_as(tmp_path, sealed, content):
    for path in sealed.folder.glob("adapter_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / PROBE_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_probe(tmp_path)


def test_a_probe_is_read_as_it_was_written(sealed, tmp_path):
    assert read_as(tmp_path, sealed, content_of(sealed)) == sealed.probe
    write_probe(tmp_path, sealed.probe)
    assert read_probe(tmp_path) == sealed.probe


HOSTILE = {
    "no json": "{",
    "a list": "[]",
    "another version": lambda c: c.update(version=2),
    "a key too many": lambda c: c.update(more=1),
    "a key too few": lambda c: c.pop("curves"),
    "no digest": lambda c: c.update(adapter="x"),
    "no curves": lambda c: c.update(curves=[]),
    "curves twice": lambda c: c["curves"].append(c["curves"][1]),
    "no base": lambda c: c["curves"][0].update(name="bass"),
    "no adapted": lambda c: c["curves"][1].update(name="adopted"),
    "a strange kind": lambda c: c["curves"][2].update(kind="odd"),
    "a scale below 0": lambda c: c["curves"][2].update(scale=-1),
    "no questions": lambda c: c.update(questions=[]),
    "ids as text": lambda c: c["questions"][0].update(ids="12"),
    "no ids": lambda c: c["questions"][0].update(ids=[]),
    "an id that is true": lambda c: c["questions"][0].update(ids=[True]),
    "a text too few": lambda c: c["questions"][0]["texts"].pop(),
    "tokens twice": lambda c: c["questions"][0]["tokens"].__setitem__(0, c["questions"][0]["tokens"][1]),
    "a row too few": lambda c: c["questions"][0]["log_probs"].pop(),
    "a number too few": lambda c: c["questions"][0]["log_probs"][0].pop(),
    "above 0": lambda c: c["questions"][0]["log_probs"][0].__setitem__(0, 0.5),
    "no number": lambda c: c["questions"][0]["log_probs"][0].__setitem__(0, None),
    "too many listed": lambda c: c["curves"][0].update(listed=4000),
    "turns of something else": lambda c: c["chats"][0].update(turns=[{"role": "user"}]),
    "half a letter": lambda c: c["chats"][0].update(text="\ud800"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_says_what_no_probe_says_is_refused(sealed, tmp_path, name):
    content = content_of(sealed)
    change = HOSTILE[name]
    if callable(change):
        change(content)
    with pytest.raises(CheckpointError, match=r"probe.json: damaged"):
        read_as(tmp_path, sealed, change if isinstance(change, str) else content)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" * 5000])
def test_a_number_that_is_none_is_refused(sealed, tmp_path, number):
    text = (sealed.folder / PROBE_FILE).read_text()
    first = text.index("[[") + 2
    with pytest.raises(CheckpointError, match="damaged"):
        read_as(tmp_path, sealed, text[:first] + number + "," + text[first:])


def test_a_probe_of_another_adapter_is_refused(sealed, tmp_path):
    adapted(3).save_pretrained(tmp_path)
    (tmp_path / PROBE_FILE).write_bytes((sealed.folder / PROBE_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="another adapter"):
        read_probe(tmp_path)


def test_a_folder_without_a_probe_says_how_to_make_one(tmp_path, capsys):
    adapted().save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--server", "http://127.0.0.1:1"]) == 2
    assert "minilora seal" in capsys.readouterr().err
    with pytest.raises(MiniLoraError, match="no such folder"):
        read_probe(tmp_path / "none")


# ---- commands


def test_seal_and_verify_in_peft_and_transformers(tmp_path, capsys):
    pytest.importorskip("peft")
    import peft

    base().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    foreign = peft.get_peft_model(base(), config)
    foreign.save_pretrained(tmp_path / "foreign")
    folder, model = str(tmp_path / "foreign"), str(tmp_path / "base")
    assert main(["seal", folder, "--model", model, "--prompts", "hello there"]) == 0
    assert "questions, whose answers the adapter moves" in capsys.readouterr().out
    for program in ("peft", "transformers"):
        assert main(["verify", folder, "--in", program, "--model", model]) == 0, program
        assert "applied right" in capsys.readouterr().out
    assert main(["verify", folder, "--in", "peft"]) == 2
    base(7).save_pretrained(tmp_path / "strange")
    assert main(["verify", folder, "--in", "peft", "--model", str(tmp_path / "strange")]) == 1


@pytest.mark.parametrize("command", [["seal"], ["generate", "hello", "--adapter"]])
def test_a_base_that_is_not_here_is_named_with_the_way_out(sealed, tmp_path, capsys, command):
    folder = shutil.copytree(sealed.folder, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "no/where"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "minilora.json").unlink()
    more = ["--model", "no/where"] if command[0] == "generate" else []
    assert main([*command, str(folder), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model 'no/where'" in line
    assert line.endswith(f"; {folder} names this base: --model takes the same one from another place") == (not more)


def test_what_is_of_llama_cpp_alone_is_refused_elsewhere(sealed, capsys):
    for words in (["--base", "x.gguf", "--in", "peft"], ["--lora", "x.gguf", "--server", "http://127.0.0.1:1"]):
        assert main(["verify", str(sealed.folder), *words]) == 2
        assert "is for --in llama.cpp; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["peft", "transformers"])
def test_a_packed_base_is_refused_with_the_way_out(sealed, tmp_path, capsys, program):
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    write_model(base(), sealed.tokenizer, tmp_path / "base.gguf", "Q8_0")
    assert main(["verify", str(sealed.folder), "--in", program, "--model", str(tmp_path / "base.gguf")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "its layers are packed" in said and "--in llama.cpp" in said


def test_a_base_that_cannot_be_asked_so_is_one_line_and_no_verdict(sealed, tmp_path, capsys):
    pytest.importorskip("peft")
    base().save_pretrained(tmp_path / "base")
    folder = shutil.copytree(sealed.folder, tmp_path / "adapter")
    write_probe(folder, replace(sealed.probe, questions=(replace(sealed.probe.questions[0], ids=(5, 99_999)),)))
    assert main(["verify", str(folder), "--in", "peft", "--model", str(tmp_path / "base")]) == 2
    assert "cannot answer the probe's questions" in capsys.readouterr().err


def test_no_probe_is_made_of_nan(tmp_path):
    model = adapted()
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data[0] = torch.nan
    with pytest.raises(StateError, match="adapted model answers NaN"):
        measure(model, byte_tokenizer(), ["hello there"], adapter="0" * 64, name="tiny")
    with pytest.raises(StateError, match="answers NaN"):
        answers_of(model, probe_of(adapted()).questions)


@pytest.mark.parametrize(
    "words", [[], ["--server", "http://x", "--in", "peft"], ["--server", "file:///etc/passwd"], ["--in", "llama.cpp"]]
)
def test_what_cannot_be_meant_is_refused(sealed, capsys, words):
    assert main(["verify", str(sealed.folder), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
