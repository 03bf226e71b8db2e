"""A chat template that prints the day can be told which one, and a run that goes on with another says so."""

import datetime
import json

import pytest

pytest.importorskip("transformers")

from minilora.errors import CheckpointError, ConfigError
from minilora.hf.dates import date_of, dated
from minilora.job import finetune, loading
from minilora.lora.config import LoraConfig
from minilora.training.loop import TrainConfig
from tests.data import kinds

TURNS = [{"role": "user", "content": "hi"}]
FORMATS = ["%d %b %Y", "%Y-%m-%d", "%A, %-d. %B %y", "100%% at %H:%M:%S, 5% x%", "%j %U %p", ""]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("before", ["", "\n", "  \n  {% if true %}a{% endif %}\n"])
def test_the_day_is_printed_as_strftime_prints_it(form, before):
    """And all around it stays as it is, spaces and line ends too."""
    tokenizer = kinds.tokenizer_of("bytes")
    source = (
        before + "{% if strftime_now is defined %}[{{ strftime_now('FORM') }}]{% endif %}\n|{{ messages[0].content }}"
    )
    tokenizer.chat_template = source.replace("strftime_now('FORM')", repr(datetime.datetime(2024, 2, 9).strftime(form)))
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=False)
    tokenizer.chat_template = source.replace("FORM", form)
    dated(tokenizer, "2024-02-09")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == wanted


def test_other_templates_stay_as_they_are():
    tokenizer = kinds.tokenizer_of("bytes")
    tokenizer.chat_template = {"default": kinds.CHATML, "tool_use": kinds.DATED}
    dated(tokenizer, "")
    assert tokenizer.chat_template == {"default": kinds.CHATML, "tool_use": kinds.DATED}
    dated(tokenizer, "2024-02-09")
    assert tokenizer.chat_template["default"] == kinds.CHATML and tokenizer.chat_template["tool_use"] != kinds.DATED
    assert date_of(tokenizer, "2024-02-09") == "2024-02-09"
    tokenizer.chat_template = kinds.CHATML
    assert date_of(tokenizer, "2024-02-09") == "" and dated(None, "2024-02-09") is None and date_of(None, "") == ""


@pytest.mark.parametrize("date", ["today", "2024-2-9", "20240209", "2024-02-30", "9.2.2024", 20240209, None])
def test_what_is_no_day(date):
    with pytest.raises(ConfigError, match="wanted a day such as 2025-01-31"):
        finetune.Job("m", "d", "o", date=date)


@pytest.fixture
def job(model_folder, tmp_path, monkeypatch):
    """``job(**fields)``: runs a job of a model whose template prints the day, from or to a checkpoint after step 1 of 2."""
    data = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    plain, said = loading.load_tokenizer, []

    def load(name, trust_remote_code=False):
        tokenizer = plain(name, trust_remote_code)
        tokenizer.chat_template = kinds.DATED
        return tokenizer

    monkeypatch.setattr(loading, "load_tokenizer", load)

    def run(steps=2, **fields):
        training = TrainConfig(steps=2, save_every=1, batch_size=1, keep_checkpoints=5)
        lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
        given = {"quant": "none", "eval_share": 0.0, "training": training, "lora": lora, **fields}
        finetune.fine_tune(finetune.Job(model_folder, str(data), str(tmp_path / "run"), **given), said.append)
        return tmp_path / "run" / "adapter_model.safetensors"

    run.said = said
    return run


def test_a_run_goes_on_on_another_day_if_it_is_told_the_first(job, monkeypatch):
    first = job().read_bytes()

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2999, 1, 2)

    today = datetime.date.today().isoformat()
    monkeypatch.setattr("minilora.hf.dates.datetime.date", Tomorrow)
    plain = loading.dated
    monkeypatch.setattr(loading, "dated", lambda tokenizer, date: plain(tokenizer, date or "2999-01-02"))
    words = f"another data set: training data is .*; the chat template prints the date, which is 2999-01-02 now and was {today}: give "
    with pytest.raises(
        CheckpointError, match=f"{words}--date {today} .*, or set it back, or begin anew with --overwrite"
    ):
        job(resume=True)
    assert job(resume=True, date=today).read_bytes() == first
