"""What the report of a run showed is what one gets: its base, packing, system turn and template are taken from its record."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from minilora import QuantConfig
from minilora.cli import main
from minilora.errors import for_terminal
from minilora.job.finetune import fine_tune
from minilora.job.record import RECORD_FILE, read_record, write_record
from tests.job.asked import SYSTEM


@pytest.fixture(scope="module")
def run(make_job, tmp_path_factory):
    """A run whose prompts were asked with a system turn, on a packed base, and its answers after training."""
    out = tmp_path_factory.mktemp("run") / "out"
    job = make_job(out, steps=6, system=SYSTEM)
    outcome = fine_tune(job, lambda line: None)
    return str(out), {pair["prompt"]: pair["after"] for pair in outcome.answers}


def generate(capsys, *arguments):
    """What ``minilora generate`` prints, and what it says beside."""
    assert main(["generate", "--device", "cpu", *arguments]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_without_a_prompt_it_asks_what_the_report_asked(capsys, run):
    out, after = run
    printed, beside = generate(capsys, "--adapter", out)
    assert printed == for_terminal("".join(f"> {prompt}\n{answer}\n\n" for prompt, answer in after.items()))
    assert beside == ""


@pytest.mark.parametrize("at", [0, 1])
def test_one_prompt_gives_the_answer_of_the_report(capsys, run, at):
    out, after = run
    prompt = list(after)[at]
    assert generate(capsys, "--adapter", out, prompt) == (for_terminal(after[prompt]) + "\n", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quant", "none"], "the base is not packed, and was packed to nf4, double quantization"),
        (["--quant", "nf3"], "the base is packed to nf3, double quantization, and was packed to nf4"),
        (["--dtype", "bfloat16"], "its weights are bfloat16, and were float32"),
    ],
)
def test_a_flag_wins_and_the_difference_is_said(capsys, run, flags, said):
    out, _ = run
    beside = generate(capsys, "--adapter", out, *flags, "What?")[1]
    assert beside.startswith(f"{out}: ") and said in beside and beside.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], QuantConfig("nf4", double_quant=True)),
        (["--quant", "nf3"], QuantConfig("nf3")),
        (["--quant", "none"], None),
    ],
)
def test_the_base_is_packed_as_it_was_or_as_a_flag_says(capsys, monkeypatch, run, flags, wanted):
    import minilora.hf

    seen, load = [], minilora.hf.load_model
    monkeypatch.setattr(minilora.hf, "load_model", lambda *_, **o: seen.append(o["quant"]) or load(*_, **o))
    generate(capsys, "--adapter", run[0], *flags, "What?")
    assert [found and (found.format, found.double_quant) for found in seen] == [wanted and (wanted.format, True)]


def test_the_system_turn_is_part_of_it(capsys, run):
    """Another one, or none, gives other answers: so it was the remembered one that gave those of the report."""
    out, after = run
    assert generate(capsys, "--adapter", out, "--system", "", "What?")[0] != for_terminal(after["What?"]) + "\n"
    assert generate(capsys, "--adapter", out, "--system", SYSTEM, "What?")[0] == for_terminal(after["What?"]) + "\n"


def test_tokens_are_as_many_as_in_the_report_unless_it_is_said(capsys, run):
    out, after = run
    shorter, _ = generate(capsys, "--adapter", out, "--max-new-tokens", "2", "What?")
    assert for_terminal(after["What?"]).startswith(shorter.strip()) and len(shorter.strip()) < len(after["What?"])


def test_another_template_is_said(capsys, run, model_folder, tmp_path):
    out, _ = run
    other = tmp_path / "model"
    shutil.copytree(model_folder, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert "the chat template is another one" in generate(capsys, "--adapter", out, "--model", str(other), "What?")[1]


def test_another_base_is_said_where_it_is_allowed(capsys, run, make_llama, model_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = run
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    other.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    given = ["--adapter", out, "--model", str(tmp_path / "model"), "What?"]
    assert main(["generate", *given]) == 2
    assert "job.json" not in capsys.readouterr().err
    assert "the base is another model: its weights are not those" in generate(capsys, *given, "--allow-other-base")[1]


def test_a_folder_that_is_no_run_wants_its_model(capsys, run, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "minilora.json"):
        shutil.copy(f"{run[0]}/{name}", tmp_path / name)
    assert main(["generate", "--adapter", str(tmp_path), "What?"]) == 2
    said = capsys.readouterr().err
    assert "--model: missing" in said and "holds no job.json" in said


def test_a_checkpoint_of_the_run_is_asked_alike(capsys, run):
    out, after = run
    assert generate(capsys, "--adapter", f"{out}/checkpoint-6", "What?") == (for_terminal(after["What?"]) + "\n", "")


def test_a_damaged_record_is_refused(capsys, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / RECORD_FILE).write_text("{}")
    assert main(["generate", "--adapter", str(tmp_path / "run"), "What?"]) == 2
    assert "job.json: damaged" in capsys.readouterr().err


def test_a_record_does_not_let_code_run(capsys, run, tmp_path, model_folder):
    """Whoever changes a record names another model at most: its code is run if the user says so, and never because a file does."""
    shutil.copytree(run[0], tmp_path / "run")
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    code = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Model: ...\nclass Config: ...\n"
    (tmp_path / "model" / "own.py").write_text(code)
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    record = read_record(tmp_path / "run")
    write_record(
        tmp_path / "run",
        replace(record, model=str(tmp_path / "model"), settings={**record.settings, "trust_remote_code": True}),
    )
    assert main(["generate", "--adapter", str(tmp_path / "run"), "What?"]) == 2
    assert "trust-remote-code" in capsys.readouterr().err and not (tmp_path / "model" / "ran").exists()


# ---- merge and export


def test_merge_takes_the_base_and_names_what_was_measured(capsys, run, model_folder, tmp_path):
    out, _ = run
    assert main(["merge", "--adapter", out, "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr()
    measured = f"measured on {model_folder}, packed to nf4, double quantization, in float32, with the adapter beside it"
    assert measured in said.out and f"merged into the dense {model_folder} in float32" in said.out
    assert said.err == "" and (tmp_path / "merged" / "model.safetensors").is_file()


def test_merge_of_a_dense_run_has_no_more_to_say(capsys, make_job, tmp_path):
    fine_tune(make_job(tmp_path / "out", quant="none", prompts=()), lambda line: None)
    assert main(["merge", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "not packed, in float32, with the adapter beside it\n" in said and "can be others" not in said


def test_export_loads_the_base_as_it_was_trained_on(capsys, make_job, tmp_path):
    job = make_job(tmp_path / "out", prompts=())
    fine_tune(replace(job, lora=replace(job.lora, init_lora_weights="olora")), lambda line: None)
    given = ["export", "--adapter", str(tmp_path / "out"), "--for", "vllm", "--out", str(tmp_path / "exported")]
    assert main(given) == 0
    said = capsys.readouterr().err
    assert f"{job.model}, packed to nf4, double quantization, in float32, as the run of" in said
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
