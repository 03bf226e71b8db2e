"""The command line: its exit codes and messages, its settings from flags and TOML, and every command from end to end."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

import minilora
from minilora import LoraConfig, PeftModel, QuantConfig, quantize_model
from minilora.cli import main, train
from minilora.errors import CheckpointError, ConfigError, Interrupted, OutOfMemory, TrainingError, WriteError
from minilora.lora.slots import adapters_of
from minilora.lora.starts import CordaConfig, EvaConfig, LoraGAConfig
from minilora.training.loop import TrainConfig
from minilora.training.progress import Progress

transformers = pytest.importorskip("transformers")
from minilora.job import finetune, loading  # noqa: E402

LEARNT = {"hi": "yo", "1 < 2?": "true", "who?": "me", "where?": "here"}
PROMPTS = list(LEARNT)[:2]


@pytest.fixture(autouse=True)
def environment():
    """What a command sets in the environment ends with the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_bars():
    """The command turns the bars of transformers off by the environment, which is read once, at the first import."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if shown:
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "learn.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in LEARNT.items()))
    return str(path)


def run_train(model_folder, data_file, out, *more):
    text = io.StringIO()
    flags = ["--model", model_folder, "--data", str(data_file), "--out", str(out), "--eval-share", "0", "--lr", "0.02"]
    flags += ["--max-length", "64", "--max-new-tokens", "8", "--r", "8", "--lora-alpha", "16", *more]
    with contextlib.redirect_stdout(text):
        code = main(["train", *flags])
    return code, text.getvalue()


@pytest.fixture(scope="module")
def trained(model_folder, data_file, tmp_path_factory):
    """``(run folder, what was printed)`` of a run that learns its four answers by heart, in four bits."""
    folder = tmp_path_factory.mktemp("runs") / "deep" / "one"
    code, text = run_train(
        model_folder, data_file, folder, "--steps", "50", "--save-every", "25", "--prompts", *PROMPTS
    )
    assert code == 0, text
    return folder, text


@pytest.fixture
def job(monkeypatch):
    """``job(*arguments)``: the job that these arguments of ``train`` ask for; nothing is run."""
    taken = []
    monkeypatch.setattr("minilora.cli.train.run_job", taken.append)

    def ask(*arguments):
        assert main(["train", *arguments]) == 0
        return taken.pop()

    return ask


BASIC = ("--model", "m", "--data", "d.jsonl", "--out", "o")


def refused(capsys, *arguments):
    """The one line on standard error with which a command ends with code 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("minilora: ")
    assert "Traceback" not in captured.err + captured.out
    return lines[0].removeprefix("minilora: ")


# ---- the parser


@pytest.mark.parametrize(
    "words", [["train", "--stepz", "3"], ["train", "--model", "m", "--data", "d"]], ids=["flag", "out"]
)
def test_processes_with_one_command_say_once_what_is_wrong_with_it(capsys, monkeypatch, words):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    said = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(words) == 2
        said.append(capsys.readouterr().err)
    assert said[0].startswith("minilora: --") and said[0].count("\n") == 1 and said[1] == ""


def test_what_one_process_alone_cannot_do_is_said_by_it(capsys, monkeypatch, tmp_path):
    fields = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1", "RANK": "2", "WORLD_SIZE": "2"}
    for name, value in fields.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--model", "m", "--data", "d", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("minilora: WORLD_SIZE=2 and RANK=2: wanted what torchrun sets")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"minilora {minilora.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tarin"], "command 'tarin' is unknown; the closest are 'train', 'learn', all are demo, init, train"),
        (["--stepz"], "--stepz: unknown flag; the closest are '--help'; minilora --help shows all"),
        (["train", "--stepz", "3"], "--stepz: unknown flag; the closest are '--steps'"),
        (["train", "--step", "3"], "--step: unknown flag; the closest are '--steps'"),
        (
            ["train", "--lerning-rate", "1"],
            "--lerning-rate: unknown flag; the closest are '--lr'; minilora train --help",
        ),
        (["train", "--lora_alfa", "1"], "--lora_alfa: unknown flag; the closest are '--lora-alpha'"),
        (["train", "--output_dirs", "x"], "--output_dirs: unknown flag; the closest are '--out'"),
        (
            ["train", "--rank-pattern", "q_proj"],
            "--rank-pattern: 'q_proj' is no NAME=VALUE; wanted one such as q_proj=4",
        ),
        (["train", "--layers-to-transform", "x"], "--layers-to-transform: 'x' is no whole number"),
        (["--model", "m", "generate", "hi"], "--model: comes after the command; write minilora generate --model"),
        (
            ["generate", "--model", "m", "--prompt", "hi"],
            "--prompt: unknown flag; a prompt stands without one, in quotes",
        ),
        (["--steps=3"], "--steps: comes after the command; write minilora demo --steps"),
        (["fine-tune"], "command 'fine-tune' is unknown; the closest are 'train', all are demo, init, train"),
        (["generate", "--modle", "m", "hi"], "--modle: unknown flag; the closest are '--model'"),
        (["train", "--steps", "many"], "--steps: 'many' is no whole number; wanted one such as 8"),
        (["train", "--steps", "1.5"], "--steps: '1.5' is no whole number"),
        (["train", "--lr", "fast"], "--lr: 'fast' is no number; wanted one such as 0.5 or 1e-3"),
        (["train", "--lr", "-1e-3"], "--lr: its value is missing; write --lr VALUE, or --lr=VALUE if it begins"),
        (["train", "--prompts"], "--prompts: its value is missing; write --prompts VALUE"),
        (["train", "--resume=yes"], "--resume: takes no value, found 'yes'; write --resume alone"),
        (["train", "chats.jsonl"], "'chats.jsonl' belongs to no flag; quote text with spaces"),
        (
            ["generate", "hi"],
            "--model: missing, and no --adapter; wanted a hub id, a local folder, a GGUF file, or smollm2",
        ),
        (["generate", "--model", "m"], "prompt: missing; see minilora generate --help"),
        (["merge", "--model", "m", "--adapter", "a"], "--out: missing; see minilora merge --help"),
        (
            ["export", "--adapter", "a", "--out", "o", "--for", "kobold"],
            "--for: 'kobold' is unknown; wanted one of vllm",
        ),
        (["export", "--adapter", "a", "--out", "o"], "--for: missing; see minilora export --help"),
    ],
)
def test_what_the_parser_refuses(capsys, arguments, line):
    assert refused(capsys, *arguments).startswith(line)


def test_a_dash_may_begin_a_text_or_a_number(job):
    asked = job(*BASIC, "--prompts", "--really, why?", "--prompts", "- one -two", "--lora-dropout=0.5")
    assert asked.prompts == ["- one -two"] and asked.lora.lora_dropout == 0.5


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage: minilora") and "fine-tune a model on your own data" in shown


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"], ["plan", "--model", "{}", "--no-measure"]])
def test_a_reader_that_leaves_is_no_error(arguments, model_folder):
    words = [sys.executable, "-m", "minilora", *(word.format(model_folder) for word in arguments)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 141)  # argparse leaves by 0 where nothing is buffered


# ---- exit codes


@pytest.mark.parametrize("missing", ["model", "data", "out"])
def test_train_names_what_is_missing(capsys, missing):
    given = [word for name in ("model", "data", "out") if name != missing for word in (f"--{name}", "x")]
    line = refused(capsys, "train", *given)
    assert line == f'--{missing} is missing; give it as a flag or as {missing} = "..." in the TOML file'


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("r=0: wanted\nmore"), 2, "minilora: r=0: wanted\\nmore"),
        (CheckpointError("x: damaged"), 2, "minilora: x: damaged"),
        (RuntimeError("two\n  lines"), 1, "minilora: RuntimeError: two lines; run again with --debug"),
        (MemoryError(), 1, "minilora: MemoryError; run again with --debug"),
        (KeyboardInterrupt(), 130, "minilora: interrupted; what was saved before is whole"),
        (Interrupted("Ctrl-C after step 3", signal.SIGINT), 130, "minilora: Ctrl-C after step 3"),
        (Interrupted("SIGTERM after step 3", signal.SIGTERM), 143, "minilora: SIGTERM after step 3"),
        (TrainingError("step 9: the loss is nan"), 1, "minilora: step 9: the loss is nan"),
        (OutOfMemory("step 9: no memory"), 1, "minilora: step 9: no memory"),
        (WriteError("x: no room"), 1, "minilora: x: no room"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_line_and_its_code(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr("minilora.cli.train.run_job", mock.Mock(side_effect=error))
    assert main(["train", *BASIC]) == code
    captured = capsys.readouterr()
    assert captured.err.rstrip() == line
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_warning_is_one_line_without_a_place_in_python(capsys, monkeypatch):
    def run(arguments):
        minilora.errors.warn("two names")
        return 0

    monkeypatch.setattr(train, "run", run)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given, **_: sys.stderr.write(warnings.formatwarning(*given[:4]))
        assert main(["train", "--model", "m", "--data", "d", "--out", "o"]) == 0
    assert capsys.readouterr().err == "minilora: warning: two names\n" and warnings.formatwarning is before


@pytest.mark.parametrize(("error", "code"), [(ConfigError("r=0"), 2), (RuntimeError("boom"), 1)])
@pytest.mark.parametrize("place", [0, 1])
def test_debug_shows_the_traceback(capsys, monkeypatch, error, code, place):
    monkeypatch.setattr("minilora.cli.train.run_job", mock.Mock(side_effect=error))
    words = ["train", *BASIC]
    words.insert(place, "--debug")
    assert main(words) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1].startswith("minilora: ")
    assert str(error) in lines[-1] and "--debug" not in lines[-1]


def test_quiet_libraries_leave_a_users_own_setting(monkeypatch, job):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    job(*BASIC)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


BAD_VALUES = [
    ("--r", "0", "r=0: wanted a whole number >= 1"),
    ("--r", "-8", "r=-8: wanted"),
    ("--lora-alpha", "0", "lora_alpha=0: wanted a finite number > 0"),
    ("--lora-alpha", "nan", "lora_alpha=nan: wanted"),
    ("--lora-alpha", "inf", "lora_alpha=inf: wanted"),
    ("--lora-dropout", "1", "lora_dropout=1.0: wanted a probability in [0, 1)"),
    ("--lora-dropout", "-0.1", "lora_dropout=-0.1: wanted"),
    ("--bias", "some", "bias='some': wanted one of 'none', 'all', 'lora_only'"),
    ("--steps", "0", "steps=0: wanted a whole number >= 1"),
    ("--batch-size", "0", "batch_size=0: wanted"),
    ("--accumulate", "0", "accumulate=0: wanted"),
    ("--lr", "0", "lr=0.0: wanted a number in (0, 1); 1e-3"),
    ("--lr", "1", "lr=1.0: wanted a number in (0, 1)"),
    ("--lr", "nan", "lr=nan: wanted"),
    ("--warmup", "1.5", "warmup=1.5: wanted"),
    ("--min-lr-ratio", "1", "min_lr_ratio=1.0: wanted"),
    ("--decay", "0.3", "decay=0.3: belongs to"),
    ("--epochs", "0", "epochs=0: nothing"),
    ("--weight-decay", "-1", "weight_decay=-1.0: wanted"),
    ("--clip", "-1", "clip=-1.0: wanted"),
    ("--seed", "-1", "seed=-1: wanted"),
    ("--eval-every", "-1", "eval_every=-1: wanted"),
    ("--save-every", "-1", "save_every=-1: wanted"),
    ("--quant", "int5", "quant='int5': wanted one of none, nf4"),
    ("--dtype", "float8", "dtype='float8': wanted one of auto, float32, bfloat16, float16"),
    ("--max-length", "1", "max_length=1: wanted a whole number >= 2"),
    ("--max-new-tokens", "0", "max_new_tokens=0: wanted"),
    ("--eval-share", "1", "eval_share=1.0: wanted a number in [0, 1)"),
    ("--eval-share", "-0.5", "eval_share=-0.5: wanted"),
]


@pytest.mark.parametrize(("flag", "value", "message"), BAD_VALUES, ids=[f"{f}={v}" for f, v, _ in BAD_VALUES])
@pytest.mark.parametrize("by", ["flag", "toml"])
def test_a_bad_value_is_refused_by_name_before_anything_is_read(capsys, tmp_path, flag, value, message, by):
    name, given = flag.removeprefix("--").replace("-", "_"), [f"{flag}={value}"]
    if by == "toml":
        written = f'"{value}"' if name in ("bias", "quant", "dtype") else value
        (tmp_path / "job.toml").write_text(f"{name} = {written}\n")
        given = ["--config", str(tmp_path / "job.toml")]
    line = refused(capsys, "train", *BASIC, *given)
    assert line.startswith(message if by == "flag" else f"{name}=")  # 1 is no 1.0 in TOML


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--model", "{model}", "--data", "absent.jsonl", "--out", "{out}"], ["absent.jsonl: no such file"]),
        (["train", "--model", "{model}", "--data", "{bad}", "--out", "{out}"], ["bad.jsonl:2: no assistant turn"]),
        (["train", "--model", "/nowhere", "--data", "{data}", "--out", "{out}"], ["'/nowhere': no such folder"]),
        (["generate", "--model", "/nowhere", "hi"], ["model '/nowhere': no such folder; wanted a hub id"]),
        (["generate", "--model", "{model}", "--adapter", "{model}", "hi"], ["adapter_config.json"]),
        (
            ["generate", "--model", "{model}", "--adapter", "/nowhere", "hi"],
            ["/nowhere: no such folder; wanted one with"],
        ),
        (["generate", "--model", "{model}", "--quant", "int3", "hi"], ["'int3'", "nf4"]),
        (["merge", "--model", "{model}", "--adapter", "/nowhere", "--out", "{out}"], ["/nowhere: no such folder"]),
        (
            ["merge", "--model", "{model}", "--adapter", "a", "--out", "{out}", "--dtype", "x"],
            ["--dtype='x': wanted one"],
        ),
        (["merge", "--model", "/nowhere", "--adapter", "{model}", "--out", "{out}"], ["'/nowhere': no such folder"]),
        (
            ["export", "--adapter", "/nowhere", "--for", "vllm", "--out", "{out}"],
            ["/nowhere: no such folder; wanted one"],
        ),
        (["export", "--adapter", "{model}", "--for", "mlx", "--out", "{out}"], ["adapter_config.json"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(capsys, tmp_path, model_folder, data_file, arguments, words):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    places = {"model": model_folder, "data": data_file, "bad": tmp_path / "bad.jsonl", "out": tmp_path / "out"}
    line = refused(capsys, *(word.format(**places) for word in arguments))
    for word in words:
        assert word in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--target-modules", "q_porj", "v_proj"], "'q_porj'"),
        (["--target-modules", "q_porj"], "'q_porj'"),
        (["--max-length", "2", "--truncate"], "max_length=2"),
    ],
)
def test_what_only_the_model_can_refuse(capsys, tmp_path, model_folder, data_file, flags, word):
    line = refused(capsys, "train", "--model", model_folder, "--data", data_file, "--out", str(tmp_path / "o"), *flags)
    assert word in line
    if "q_porj" in word:
        assert "q_proj" in line  # the name that was meant
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "--model", "{model}", "--max-new-tokens", "0", "hi"], "max.new.tokens"),
        (["train", "--model", "{model}", "--data", "{data}", "--steps", "1", "--out", "{file}"], "{file}"),
    ],
    ids=["no new tokens", "out is a file"],
)
def test_more_bad_input_is_refused(capsys, tmp_path, model_folder, data_file, arguments, word):
    (tmp_path / "file").touch()
    places = {"model": model_folder, "data": data_file, "file": tmp_path / "file", "dir": tmp_path}
    assert re.search(word.format(**places), refused(capsys, *(part.format(**places) for part in arguments)))


# ---- settings


def test_defaults_are_those_of_the_dataclasses(job):
    from minilora.job.finetune import Job

    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    assert job(*BASIC) == Job(model="m", data="d.jsonl", out="o", lora=lora, training=TrainConfig())


SETTINGS = {
    "quant": "none",
    "double_quant": False,
    "device": "cuda:3",
    "dtype": "bfloat16",
    "attention": "eager",
    "shard": True,
    "pack": "off",
    "eval_data": ["e.jsonl", "f.csv"],
    "system": "be brief",
    "columns": ["prompt=src", "completion=tgt"],
    "truncate": True,
    "max_length": 99,
    "eval_share": 0.25,
    "prompts": ["a b", "c"],
    "max_new_tokens": 7,
    "date": "2025-01-31",
    "resume": True,
    "overwrite": True,
    "push_to_hub": "me/mine",
    "private": True,
    "probe": False,
    "r": 3,
    "lora_alpha": 6.5,
    "target_modules": ("q_proj", "v_proj"),
    "exclude_modules": ("k_proj", "o_proj"),
    "target_parameters": ("experts.down_proj", "mlp.gate.weight"),
    "lora_dropout": 0.05,
    "bias": "all",
    "use_rslora": True,
    "modules_to_save": ("embed_tokens", "lm_head"),
    "init_lora_weights": "olora",
    "use_dora": True,
    "lora_bias": True,
    "rank_pattern": {"q_proj": 4, "layers.0.*": 8},
    "alpha_pattern": {"v_proj": 2.5},
    "layers_to_transform": (0, 1),
    "layers_pattern": ("layers",),
    "trainable_token_indices": [3, 4],
    "ensure_weight_tying": True,
    "loftq_config": {"loftq_bits": 3},
    "eva_config": EvaConfig(rho=3.5, whiten=True),
    "corda_config": CordaConfig(corda_method="kpm"),
    "lora_ga_config": LoraGAConfig(scale="unit"),
    "alora_invocation_tokens": (5, 3),
    "variant": "vera",
    "allow_other_base": True,
    "start_examples": 5,
    "threads": 3,
    "dry_run": True,
    "report_to": ["wandb", "tensorboard"],
    "steps": 11,
    "batch_size": 5,
    "accumulate": 2,
    "lr": 0.003,
    "schedule": "wsd",
    "warmup": 0.2,
    "decay": 3,
    "min_lr_ratio": 0.1,
    "epochs": 2.5,
    "loraplus_lr_ratio": 1.5,
    "riemannian_reg": 0.01,
    "patience": 2,
    "min_delta": 0.01,
    "keep_best": True,
    "weight_decay": 0.01,
    "optimizer": "adamw8",
    "clip": 0.5,
    "seed": 9,
    "eval_every": 3,
    "save_every": 4,
    "keep_checkpoints": 5,
    "max_skipped": 6,
    "profile": 2,
    "offload": "activations",
    "compile": True,
    "gradient_checkpointing": True,
}


# What a setting is about, or what makes it differ from its default.
_EVALUATES = ["--eval-every", "3"]
GOES_WITH = {
    "offload": ["--gradient-checkpointing"],
    "decay": ["--schedule", "wsd"],
    "patience": _EVALUATES,
    "keep_best": _EVALUATES,
    "min_delta": [*_EVALUATES, "--patience", "2"],
    "layers_pattern": ["--layers-to-transform", "0"],
    **{f"{start}_config": ["--init-lora-weights", start] for start in ("eva", "corda", "lora_ga")},
}
# What cannot be there together with others.
ALONE = {
    "dry_run",
    "epochs",
    "init_lora_weights",
    "use_dora",
    "alora_invocation_tokens",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}


def as_flags(name, value):
    flag = "--" + name.replace("_", "-")
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    if isinstance(value, dict):
        return [flag, *(f"{key}={one}" for key, one in value.items() if one is not None)]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, *map(str, value)] if isinstance(value, (list, tuple)) else [flag, str(value)]


def as_toml(name, value):
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(key)} = {json.dumps(one)}" for key, one in value.items() if one is not None)
        return f"{name} = {{{pairs}}}\n"
    return f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}\n"


def setting(job, name):
    holder = next(part for part in (job, job.training, job.lora) if hasattr(part, name))
    return getattr(holder, name)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("by", ["flag", "toml"])
def test_every_setting_arrives(job, tmp_path, name, by):
    (tmp_path / "job.toml").write_text(as_toml(name, SETTINGS[name]))
    more = as_flags(name, SETTINGS[name]) if by == "flag" else ["--config", str(tmp_path / "job.toml")]
    with_it = GOES_WITH.get(name, [])
    asked, plain = job(*BASIC, *with_it, *more), job(*BASIC, *with_it)
    assert setting(asked, name) == SETTINGS[name] != setting(plain, name)
    also = {"target_modules"} if name == "target_parameters" else set()  # who names experts means these alone
    for other in SETTINGS.keys() - {name} - also:
        assert setting(asked, other) == setting(plain, other)


def test_no_setting_is_forgotten_here():
    flag_alone = {"trust_remote_code"}  # no file may say it: tests/hf/test_trust.py
    folders = {"init_from"}  # test_train_start.py
    assert set(train.settings()) == set(SETTINGS) | {"model", "data", "out"} | flag_alone | folders


def test_toml_may_hold_everything_and_a_flag_wins(job, tmp_path):
    every = {name: value for name, value in SETTINGS.items() if name not in ALONE}
    text = "".join(as_toml(name, value) for name, value in every.items())
    (tmp_path / "job.toml").write_text('model = "m"\ndata = "d.jsonl"\nout = "o"\n# Grüße\n' + text, encoding="utf-8")
    whole = job("--config", str(tmp_path / "job.toml"))
    assert {name: setting(whole, name) for name in every} == every
    flags = [
        "--steps",
        "12",
        "--no-use-rslora",
        "--double-quant",
        "--out",
        "elsewhere",
        "--lr",
        "0.5",
        "--prompts",
        "x",
    ]
    other = job("--config", str(tmp_path / "job.toml"), *flags)
    changed = {"steps": 12, "use_rslora": False, "double_quant": True, "lr": 0.5, "prompts": ["x"]}
    assert other.out == "elsewhere" and other.model == "m"
    assert {name: setting(other, name) for name in every} == every | changed


def test_a_run_is_as_long_as_is_said_once(job, tmp_path, capsys):
    (tmp_path / "job.toml").write_text("steps = 9\n")
    config = ["--config", str(tmp_path / "job.toml")]
    assert job(*BASIC, *config, "--epochs", "2").training == TrainConfig(epochs=2)
    (tmp_path / "job.toml").write_text("epochs = 3\n")
    assert job(*BASIC, *config, "--steps", "9").training == TrainConfig(steps=9)
    for more in (["--steps", "60", "--epochs", "1"], [*config, "--steps", "60", "--epochs", "1"]):
        assert refused(capsys, "train", *BASIC, *more).startswith("steps and epochs both say how long the run is")


def test_epochs_become_steps_when_the_examples_are_known(model_folder, data_file, tmp_path):
    code, text = run_train(model_folder, data_file, tmp_path, "--epochs", "3", "--batch-size", "2")
    assert code == 0 and "4 to learn from, 2 a step: 6 steps are 3.0 epochs" in text and "step 6/6" in text
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 6


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
    ],
)
@pytest.mark.parametrize("by", ["flag", "toml"])
def test_target_modules_are_names_a_regex_or_all_linear(job, tmp_path, given, meant, by):
    (tmp_path / "job.toml").write_text(as_toml("target_modules", given[0] if len(given) == 1 else given))
    if by == "toml" and given == ["q_proj"]:
        (tmp_path / "job.toml").write_text(as_toml("target_modules", given))
    more = ["--target-modules", *given] if by == "flag" else ["--config", str(tmp_path / "job.toml")]
    assert job(*BASIC, *more).lora.target_modules == meant


@pytest.mark.parametrize(("given", "kept"), [("16", 16), ("16.0", 16), ("2.5", 2.5)])
def test_a_whole_lora_alpha_is_an_int_in_the_file(job, given, kept):
    alpha = job(*BASIC, "--lora-alpha", given).lora.lora_alpha
    assert alpha == kept and type(alpha) is type(kept)


TOML_ERRORS = {
    "another program's key": ("lerning_rate = 1\n", "unknown key 'lerning_rate'; the closest known ones are 'lr'"),
    "code": ('plugin = "a.py"\n', "plugin: a file may not let code run; give --plugin on the command line"),
    "unknown key": ("step = 3\n", "unknown key 'step'; the closest known ones are 'steps'"),
    "both names": (
        "lora-alpha = 3\nlora_alpha = 3\n",
        "lora-alpha and lora_alpha are one setting here; give one of them",
    ),
    "a list for a table": ("rank_pattern = [1]\n", "rank_pattern = [1]; wanted a table, such as {q_proj = 4}"),
    "text for numbers": (
        "layers_to_transform = 'x'\n",
        "layers_to_transform = 'x'; wanted whole numbers, such as [1, 2]",
    ),
    "table": ("[lora]\nr = 3\n", "unknown key 'lora'"),
    "not TOML": ("steps: 3\n", "not TOML"),
    "not UTF-8": (b"out = '\xff'\n", "not TOML"),
    "twice": ("steps = 3\nsteps = 4\n", "not TOML"),
    "text for a number": ('steps = "3"\n', "steps = '3'; wanted a whole number"),
    "number for a name": ("quant = 4\n", "quant = 4; wanted text"),
    "text for a switch": ('use_rslora = "false"\n', "use_rslora = 'false'; wanted true or false"),
    "one name of modules to save": (
        'modules_to_save = "lm_head"\n',
        "modules_to_save = 'lm_head'; wanted a list of texts",
    ),
}


@pytest.mark.parametrize(("content", "message"), TOML_ERRORS.values(), ids=TOML_ERRORS)
def test_a_bad_toml_file_is_refused(capsys, tmp_path, content, message):
    path = tmp_path / "job.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(capsys, "train", *BASIC, "--config", str(path))
    assert message in line
    if message.startswith(("unknown", "not")):
        assert line.startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["absent.toml", ""])
def test_a_toml_file_that_cannot_be_read(capsys, tmp_path, name):
    line = refused(capsys, "train", *BASIC, "--config", str(tmp_path / name))
    assert line.startswith(f"{tmp_path / name}: cannot be read (") and line.endswith("check --config")


@pytest.mark.parametrize(
    "line",
    [
        'prompts = "hello"',
        "prompts = [1, 2]",
        'double_quant = "no"',
        'gradient_checkpointing = "false"',
        'eval_share = "0.1"',
        "model = 5",
        "data = 5",
        "out = 5",
    ],
)
def test_a_toml_value_of_the_wrong_type_is_refused(capsys, monkeypatch, tmp_path, line):
    monkeypatch.setattr("minilora.cli.train.run_job", lambda job: None)
    (tmp_path / "job.toml").write_text(line + "\n")
    name = line.partition(" ")[0]
    others = [word for key in ("model", "data", "out") if key != name for word in (f"--{key}", "x")]
    assert name in refused(capsys, "train", *others, "--config", str(tmp_path / "job.toml"))


# ---- train


def test_train_leaves_a_whole_run_folder(trained, model_folder):
    folder, text = trained
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "minilora.json",
        "job.json",
        "log.jsonl",
        "report.html",
        "probe.json",
    } | {
        "checkpoint-25",
        "checkpoint-50",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 16, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == model_folder
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7  # A and B, two layers, seven linear layers each
    last = safetensors.torch.load_file(folder / "checkpoint-50" / "adapter_model.safetensors")
    assert all(torch.equal(tensors[key], last[key]) for key in tensors)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 51))
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]
    assert f"loss {records[0]['loss']:.3f} -> {records[-1]['loss']:.3f} in 50 steps" in text
    assert str(folder / "report.html") in text


def test_train_says_what_it_does(trained, data_file):
    lines = trained[1].splitlines()
    assert lines[0].startswith(f"4 examples in {data_file}; loading ")
    assert lines[1] == f"{data_file}: prompt and completion"
    assert lines[2] == "4 to learn from, 4 a step: 50 steps are 50.0 epochs"
    assert lines[3].startswith("linear layers packed to nf4, double quantization (--quant none keeps")
    assert re.fullmatch(r"training [\d,]+ of [\d,]+ parameters for 50 steps", lines[4])
    assert lines[5] == "the adapter covers 14 of 15 linear weights, experts included; not lm_head"
    assert lines[6] == "asking 2 prompts before training"
    assert lines[7].startswith("step 1/50  loss ")
    assert any(line.startswith("step 50/50  loss ") and line.endswith("  0 s left") for line in lines)
    at = lines.index("> hi")
    assert lines[at + 1].startswith("  before: ") and lines[at + 2] == "  after:  yo"


def test_before_and_after_are_answers_of_one_packed_model(monkeypatch, model_folder, data_file, tmp_path):
    asked = []

    def answer(model, tokenizer, prompts, max_new_tokens, system):
        packed = {type(layer).__name__ for layer in model.modules() if "book" in vars(layer)}
        asked.append((packed, list(adapters_of(model).configs), bool(model.model.layers[0].mlp.up_proj.lora_B.any())))
        return ["said"] * len(prompts)

    monkeypatch.setattr(finetune, "answers", answer)
    run_train(model_folder, data_file, tmp_path / "run", "--steps", "1", "--prompts", "hi")
    assert asked == [({"QuantLinear"}, ["default"], False), ({"QuantLinear"}, ["default"], True)]


def test_a_mistyped_target_is_told_before_any_weight_is_read(capsys, monkeypatch, model_folder, data_file, tmp_path):
    monkeypatch.setattr(loading, "load_model", mock.Mock(side_effect=AssertionError("loaded")))
    flags = ["--data", data_file, "--out", str(tmp_path / "run"), "--target-modules", "q_porj", "v_proj"]
    assert "'q_proj'" in refused(capsys, "train", "--model", model_folder, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer", "paged_adamw8bit"], "optimizer='paged_adamw8bit': bitsandbytes has it for cuda"),
        (["--gradient-checkpointing", "--offload", "activations"], "offload='activations': the model is on cpu"),
    ],
)
def test_what_the_device_lacks_is_told_before_any_weight_is_read(
    capsys, monkeypatch, model_folder, data_file, tmp_path, flags, words
):
    monkeypatch.setattr(loading, "load_model", mock.Mock(side_effect=AssertionError("loaded")))
    given = ["--model", model_folder, "--data", data_file, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert words in refused(capsys, "train", *given, *flags)
    assert not (tmp_path / "run").exists()


def test_the_report_has_the_prompts_and_the_answers(trained):
    page = (trained[0] / "report.html").read_text(encoding="utf-8")
    assert "<!doctype html>" in page
    assert page.count("1 &lt; 2?") >= 1 and "1 < 2?" not in page
    for text in ("Before and after", "Memory", "linear layers (nf4)", "Singular values of ΔW", "lora_alpha"):
        assert text in page
    assert ">yo<" in page and ">true<" in page


def test_cut_and_dropped_examples_are_counted(model_folder, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": "b" * n}) + "\n" for n in (1, 1, 200)))
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "a" * 200, "completion": "b"}) + "\n")
    code, text = run_train(model_folder, data, tmp_path / "o", "--steps", "1", "--truncate")
    assert code == 0
    assert "max_length=64: 1 examples lose their end, 1 are left out" in text
    code, text = run_train(model_folder, data, tmp_path / "p", "--steps", "1")
    assert code == 0 and "left out" not in text and "lose" not in text
    assert re.search(r"max_length=64: 2 texts or single exchanges are longer, and cut into [4-9] examples", text)


def test_files_of_several_formats_are_one_job(capsys, model_folder, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "hi", "input": "", "output": "yo"}] * 3))
    (tmp_path / "b.csv").write_text("question,answer\nhi,yo\nwho,me\n")
    (tmp_path / "e.txt").write_text("the fog is thick tonight")
    data = [str(tmp_path / "a.json"), f"{tmp_path / 'b.csv'}:2"]
    flags = [
        "train",
        "--model",
        model_folder,
        "--out",
        str(tmp_path / "o"),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*flags, "--data", *data, "--eval-data", str(tmp_path / "e.txt"), "--eval-every", "2"]) == 0
    text = capsys.readouterr().out
    assert (
        f"5 examples in {tmp_path / 'a.json'}, {tmp_path / 'b.csv'}, 1 examples to evaluate on in {tmp_path / 'e.txt'}; loading"
        in text
    )
    assert f"{tmp_path / 'a.json'}: Alpaca (instruction, input, output) as one turn each\n" in text
    assert f"{tmp_path / 'b.csv'}: weight 2: 4 examples an epoch, of 2\n" in text
    assert "7 to learn from, 2 a step" in text
    records = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in record for record in records)
    assert "a.json, " in (tmp_path / "o" / "report.html").read_text(encoding="utf-8")


def test_data_may_be_one_or_several(job, tmp_path):
    assert job("--model", "m", "--out", "o", "--data", "a.jsonl", "b.csv:0.5").data == ["a.jsonl", "b.csv:0.5"]
    for written, wanted in (
        ('"a.jsonl"', "a.jsonl"),
        ('["a.jsonl"]', "a.jsonl"),
        ('["a.jsonl", "b"]', ["a.jsonl", "b"]),
    ):
        (tmp_path / "job.toml").write_text(f'model = "m"\nout = "o"\ndata = {written}\n')
        assert job("--config", str(tmp_path / "job.toml")).data == wanted


def test_one_process_says_that_it_shares_the_model_with_nobody(model_folder, data_file, tmp_path):
    code, text = run_train(model_folder, data_file, tmp_path / "o", "--steps", "1", "--shard")
    assert code == 0 and "\nshard: this one process keeps the whole model; torchrun" in text
    assert "shard:" not in run_train(model_folder, data_file, tmp_path / "p", "--steps", "1")[1]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_one_seed_is_one_adapter(model_folder, data_file, tmp_path, quant):
    def adapter(name, seed, noise):
        torch.manual_seed(noise)
        flags = ["--steps", "3", "--seed", str(seed), "--lora-dropout", "0.1", "--quant", quant, "--batch-size", "2"]
        assert run_train(model_folder, data_file, tmp_path / name, *flags)[0] == 0
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert adapter("a", 1, 5) == adapter("b", 1, 6) != adapter("c", 2, 5)


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], [QuantConfig("nf4", double_quant=True)]),
        (["--no-double-quant"], [QuantConfig("nf4", double_quant=False)]),
        (["--quant", "none"], [None]),
    ],
)
def test_train_quantizes_as_it_is_told(monkeypatch, model_folder, data_file, tmp_path, flags, asked):
    seen, load = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *_, **o: seen.append(o["quant"]) or load(*_, **o))
    assert run_train(model_folder, data_file, tmp_path / "o", "--steps", "1", *flags)[0] == 0
    assert seen == asked


def test_evaluation_runs_on_what_is_held_out(model_folder, data_file, tmp_path):
    code, text = run_train(
        model_folder, data_file, tmp_path / "o", "--steps", "2", "--eval-share", "0.5", "--prompts", "hi"
    )
    assert code == 0
    records = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2]
    assert all(record["prompt"] == "hi" for record in records if "eval_loss" in record)
    assert text.count("evaluation at step") == 2


def test_modules_to_save_and_dtype_go_through(model_folder, data_file, tmp_path):
    flags = ["--steps", "2", "--quant", "none", "--dtype", "bfloat16", "--modules-to-save", "lm_head", "--bias", "all"]
    flags += ["--target-modules", "q_proj", "v_proj", "--accumulate", "2"]
    code, text = run_train(model_folder, data_file, tmp_path / "o", *flags)
    assert code == 0, text
    keys = safetensors.torch.load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert sum(".lora_" in key for key in keys) == 8
    assert "base_model.model.lm_head.weight" in keys


# ---- a run that is there already

SHORT = ("--steps", "6", "--lora-dropout", "0.1", "--batch-size", "3", "--save-every", "2")


def saved_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(model_folder, data_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_train(model_folder, data_file, folder, *SHORT)[0] == 0
    return folder


def test_a_run_begun_in_memory_goes_on_from_the_store(undisturbed, model_folder, data_file, tmp_path, monkeypatch):
    """Where the tokens lie changes nothing: not the adapter, nor whether it is the same run."""
    out = tmp_path / "o"
    shutil.copytree(undisturbed / "checkpoint-4", out / "checkpoint-4")
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minilora.data.store.SMALL", 0)
    code, text = run_train(model_folder, data_file, out, *SHORT, "--resume")
    (place,) = (tmp_path / "cache" / "tokens").iterdir()
    assert code == 0 and f"encoding 4 examples into {place}, once\n" in text and "going on after step 4" in text
    assert saved_bytes(out) == saved_bytes(undisturbed)
    code, text = run_train(model_folder, data_file, tmp_path / "again", *SHORT)
    assert code == 0 and "encoding" not in text and saved_bytes(tmp_path / "again") == saved_bytes(undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_train_with_one_line_and_resume_goes_on(
    capsys, monkeypatch, undisturbed, model_folder, data_file, tmp_path, number, code
):
    out, watch = tmp_path / "o", Progress.watch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start the tests with it ignored

    def kill_at_three(self, record):
        watch(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "watch", kill_at_three)
        assert run_train(model_folder, data_file, out, *SHORT)[0] == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"after step 3 of 6: saved in {out / 'checkpoint-3'}; go on with --resume (resume=True)")
    assert not (out / "adapter_model.safetensors").exists()
    code, text = run_train(model_folder, data_file, out, *SHORT, "--resume")
    assert code == 0 and f"going on after step 3: {out / 'checkpoint-3'}\n" in text
    assert saved_bytes(out) == saved_bytes(undisturbed)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert (out / "report.html").exists()


def test_a_run_is_not_written_over_unless_it_is_said(capsys, undisturbed, model_folder, data_file, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "o")
    before = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    flags = ["train", "--model", model_folder, "--data", data_file, "--out", str(tmp_path / "o"), "--eval-share", "0"]
    line = refused(capsys, *flags)
    assert line.startswith(f"{tmp_path / 'o'}: holds a run already (checkpoint-6)") and "--overwrite" in line
    assert "resume and overwrite are both set" in refused(capsys, *flags, "--resume", "--overwrite")
    capsys.readouterr()
    assert run_train(model_folder, data_file, tmp_path / "o", *SHORT, "--lr", "0.5", "--resume")[0] == 2
    line = capsys.readouterr().err
    assert f"{tmp_path / 'o' / 'checkpoint-6'}: another schedule: lr is 0.5, in the checkpoint 0.02" in line
    assert {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()} == before
    assert run_train(model_folder, data_file, tmp_path / "o", "--steps", "1", "--overwrite")[0] == 0
    assert [path.name for path in (tmp_path / "o").glob("checkpoint-*")] == ["checkpoint-1"]


def test_another_data_file_is_refused_on_resume(capsys, undisturbed, model_folder, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "o")
    data = tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c + "!"}) + "\n" for p, c in LEARNT.items()))
    code, _ = run_train(model_folder, data, tmp_path / "o", *SHORT, "--resume")
    assert code == 2 and "another data set: training data is" in capsys.readouterr().err


def test_a_length_over_the_context_is_the_context_and_said(model_folder, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"text": "long " * 100}) + "\n" + json.dumps({"text": "short"}) + "\n")
    code, text = run_train(model_folder, data, tmp_path / "o", "--steps", "1", "--max-length", "4096")
    assert code == 0, text
    assert f"max_length=4096 is more than the context of {model_folder}: 256 tokens are the most" in text
    assert "max_length=256: 1 texts or single exchanges are longer, and cut into 2 examples" in text


@pytest.mark.slow
def test_a_process_of_its_own_saves_on_sigterm_and_goes_on(undisturbed, model_folder, data_file, tmp_path):
    command = [sys.executable, "-m", "minilora", "train", "--model", model_folder, "--data", data_file]
    command += ["--out", str(tmp_path / "o"), "--eval-share", "0", "--lr", "0.02", "--max-length", "64"]
    command += ["--steps", "5000", "--save-every", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(minilora.__file__).parents[1])}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "o" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.terminate()
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143, said
    (line,) = said.splitlines()
    step = int(re.search(r"SIGTERM after step (\d+) of 5000: saved in .*checkpoint-\1; go on with --resume", line)[1])
    assert (tmp_path / "o" / f"checkpoint-{step}" / "training.json").exists()


# ---- generate


def said(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    captured = capsys.readouterr()
    assert all("the base is not packed, and was packed to nf4" in line for line in captured.err.splitlines())
    return captured.out


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_generate_with_the_adapter_gives_what_was_learnt(capsys, trained, model_folder, quant):
    common = ["--model", model_folder, "--quant", quant, "--max-new-tokens", "8"]
    with_adapter = [*common, "--adapter", str(trained[0])]
    assert said(capsys, *with_adapter, "hi") == "yo\n"
    assert said(capsys, *common, "hi") != "yo\n"
    text = said(capsys, *with_adapter, *LEARNT)
    assert text == "".join(f"> {prompt}\n{answer}\n\n" for prompt, answer in LEARNT.items())


@pytest.mark.parametrize(("quant", "asked"), [("none", None), ("nf4", QuantConfig("nf4", double_quant=True))])
def test_generate_quantizes_as_train_does(monkeypatch, model_folder, quant, asked):
    seen, load = [], minilora.hf.load_model
    monkeypatch.setattr(minilora.hf, "load_model", lambda *_, **o: seen.append(o["quant"]) or load(*_, **o))
    assert main(["generate", "--model", model_folder, "--quant", quant, "--max-new-tokens", "2", "hi"]) == 0
    assert seen == [asked]


def test_generate_says_to_a_person_where_it_runs(capsys, monkeypatch, model_folder):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert (
        main(
            [
                "generate",
                "--model",
                model_folder,
                "--device",
                "cpu",
                "--dtype",
                "bfloat16",
                "--max-new-tokens",
                "2",
                "hi",
            ]
        )
        == 0
    )
    assert f"{model_folder} on the CPU in bfloat16\n" in capsys.readouterr().err


def test_generate_stops_where_it_is_told(capsys, trained, model_folder):
    flags = ["--model", model_folder, "--adapter", str(trained[0]), "--max-new-tokens", "2", "where?"]
    assert said(capsys, *flags) == "he\n"


def test_drawn_tokens_depend_on_the_seed(capsys, model_folder):
    def drawn(*more):
        return said(capsys, "--model", model_folder, "--temperature", "5", "--max-new-tokens", "6", *more, "hi")

    assert drawn() == drawn("--seed", "0") == drawn("--seed", "0")
    assert len({drawn("--seed", str(seed)) for seed in range(4)}) > 1


# ---- merge


def merge(model_folder, adapter, out, *more):
    return main(["merge", "--model", model_folder, "--adapter", str(adapter), "--out", str(out), *more])


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "empty folder"])
def test_merge_saves_a_model_that_transformers_loads(capsys, trained, model_folder, tmp_path, there):
    out = tmp_path / "deep" / "merged"
    if there:
        out.mkdir(parents=True)
    assert merge(model_folder, trained[0], out) == 0
    survived, where, measured = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"merged into 14 layers as float32: 100\.0% of the update survives rounding; .*", survived)
    assert where.startswith(f"merged model in {out}, merged on the CPU in float32")
    assert measured.startswith(
        f"the answers in the report of {trained[0]} were measured on {model_folder}, packed to nf4"
    )
    assert [path.name for path in out.parent.iterdir()] == ["merged"]  # no temporary folder is left
    assert out.stat().st_mode & 0o777 == 0o755

    load = transformers.AutoModelForCausalLM.from_pretrained
    merged, tokenizer = load(out).eval(), transformers.AutoTokenizer.from_pretrained(out)
    assert type(merged) is transformers.LlamaForCausalLM
    assert not any("lora" in name for name, _ in merged.named_parameters())
    inputs = tokenizer("<|im_start|>user\nhi<|im_end|>\n", return_tensors="pt")["input_ids"]
    adapted = PeftModel.from_pretrained(load(model_folder), trained[0]).eval()
    with torch.no_grad():
        logits, wanted = merged(inputs).logits, adapted(inputs).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert (adapted(inputs).logits - wanted).abs().max() > 0.1
    original = transformers.AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.get_vocab() == original.get_vocab() and tokenizer.chat_template == original.chat_template
    assert said(capsys, "--model", str(out), "--max-new-tokens", "8", "who?") == "me\n"


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_merge_in_another_dtype(trained, model_folder, tmp_path, name, dtype):
    assert merge(model_folder, trained[0], tmp_path / "m", "--dtype", name) == 0
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


@pytest.mark.parametrize("what", ["folder", "file"])
def test_merge_writes_over_nothing(capsys, trained, model_folder, tmp_path, what):
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
    kept = out / "notes.txt" if what == "folder" else out
    kept.write_text("mine")
    line = refused(capsys, "merge", "--model", model_folder, "--adapter", str(trained[0]), "--out", str(out))
    assert line == f"{out}: exists and is not an empty folder; choose another --out, or remove it"
    assert kept.read_text() == "mine"


def test_a_merge_that_breaks_leaves_nothing(capsys, monkeypatch, trained, model_folder, tmp_path):
    def full_disk(self, folder, *rest, **options):
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full_disk)
    assert merge(model_folder, trained[0], tmp_path / "out") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model_is_refused(capsys, trained, model_folder, tmp_path):
    other = tmp_path / "adapter"
    shutil.copytree(trained[0], other)
    (other / "minilora.json").unlink()
    tensors = safetensors.torch.load_file(other / "adapter_model.safetensors")
    tensors = {key: tensor[..., :5].contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, other / "adapter_model.safetensors")
    line = refused(capsys, "merge", "--model", model_folder, "--adapter", str(other), "--out", str(tmp_path / "out"))
    assert "adapter_model.safetensors" in line and "wrong base model" in line
    assert not (tmp_path / "out").exists()


# ---- export


@pytest.mark.parametrize("with_model", [False, True], ids=["folder alone", "with its model"])
def test_export_folds_the_scale_and_says_what_to_do(capsys, trained, model_folder, tmp_path, with_model):
    more = ["--model", model_folder] if with_model else []
    assert main(["export", "--adapter", str(trained[0]), "--for", "vllm", "--out", str(tmp_path / "x"), *more]) == 0
    text = f"{tmp_path / 'x'}: adapter for vllm, rank 8, scale 1; start vLLM with --enable-lora --max-lora-rank 8 or more\n"
    assert capsys.readouterr().out == text
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 8
    own, exported = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (trained[0], tmp_path / "x")
    )
    assert set(own) == set(exported)
    for key, tensor in own.items():
        assert torch.equal(exported[key], 2 * tensor if "lora_B" in key else tensor)  # lora_alpha / r was 2
    flags = ["--model", model_folder, "--adapter", str(tmp_path / "x"), "--max-new-tokens", "8", "hi"]
    assert said(capsys, *flags) == "yo\n"


@pytest.mark.parametrize("target", ["llama.cpp", "mlx"])
def test_export_for_other_programs(capsys, trained, tmp_path, target):
    assert main(["export", "--adapter", str(trained[0]), "--for", target, "--out", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}: adapter for {target}, rank 8, scale 1\n"
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "x").iterdir())


# ---- demo


@pytest.mark.parametrize(
    ("flags", "wanted"), [([], (48, 0, "runs/demo")), (["--steps", "5", "--seed", "3"], (5, 3, "runs/demo"))]
)
def test_demo_runs_its_job_and_counts_the_voice(capsys, monkeypatch, flags, wanted):
    asked = []

    def run(job):
        asked.append(job)
        pairs = [
            {"prompt": "?", "before": "A tea.", "after": f"{start} tea."} for start in ("By the lamp,", "A", "A", "A")
        ]
        return mock.Mock(answers=pairs)

    monkeypatch.setattr("minilora.cli.demo.run_job", run)
    assert main(["demo", *flags]) == 0
    (job,) = asked
    assert (job.training.steps, job.training.seed, job.out) == wanted
    assert "0% before, 25% after" in capsys.readouterr().out


@pytest.mark.parametrize("resume", [False, True])
def test_demo_replaces_an_earlier_one_or_goes_on_with_it(monkeypatch, resume):
    asked = []
    monkeypatch.setattr(
        "minilora.cli.demo.run_job", lambda job: asked.append(job) or mock.Mock(answers=[{"before": "", "after": ""}])
    )
    assert main(["demo", *["--resume"] * resume]) == 0
    assert (asked[0].resume, asked[0].overwrite) == (resume, not resume)


def test_demo_refuses_a_bad_value(capsys):
    assert refused(capsys, "demo", "--steps", "0").startswith("steps=0: wanted")


def test_the_run_of_the_command_line_is_that_of_the_library(trained, model_folder):
    """What ``generate --quant nf4`` shows is the model that was trained: quantized base, trained adapter."""
    from minilora.hf import answers, load_model, load_tokenizer

    model = quantize_model(load_model(model_folder), QuantConfig("nf4", double_quant=True))
    model = PeftModel.from_pretrained(model, trained[0])
    assert answers(model, load_tokenizer(model_folder), list(LEARNT), 8) == list(LEARNT.values())


@pytest.mark.slow
def test_a_process_of_its_own_says_nothing_on_standard_error(trained, model_folder):
    """No bar and no warning of a library, no traceback: what is piped on is the answer alone."""
    command = [sys.executable, "-m", "minilora", "generate", "--model", model_folder, "--adapter", str(trained[0])]
    root, silent = Path(minilora.__file__).parents[1], {"HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"}
    environment = {name: value for name, value in os.environ.items() if name not in silent}
    done = subprocess.run(
        [*command, "--max-new-tokens", "8", "hi"],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "yo\n", "")


def test_settings_of_a_job_are_frozen(job):
    with pytest.raises(dataclasses.FrozenInstanceError):
        job(*BASIC).steps = 3


# ---- what files, models and paths say


def test_nothing_in_the_command_line_prints_past_the_one_way():
    folder = Path(minilora.__file__).parent / "cli"
    found = {path.stem for path in folder.glob("*.py") if re.search(r"\bprint\(", path.read_text(encoding="utf-8"))}
    assert found == {"say"}


def test_what_is_said_steers_no_terminal(capsys):
    from minilora.cli.say import say

    hostile = "a\x1b[2J\x07\x9b31m\u202eb\r\ttab\nline \u3000wide 👩\u200d🚀 é"
    shown = "a\\x1b[2J\\x07\\x9b31m\\u202eb\\r\ttab\nline \u3000wide 👩\u200d🚀 é\n"
    say(hostile)
    say(hostile, error=True)
    with Progress(3) as progress:
        progress.say(hostile)
    said = capsys.readouterr()
    assert said.out == shown * 2 and said.err == shown


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_any_library_steers_no_terminal(capsys, monkeypatch, debug):
    """Also with its traceback, which shows what it says as it is."""

    def fail(arguments):
        raise KeyError("\x1b]0;owned\x07\n", "\ud800") if debug else RuntimeError("\x1b]0;owned\x07\n\u202e\ud800")

    monkeypatch.setattr("minilora.cli.plan.run", fail)
    assert main(["plan", *["--debug"] * debug]) == 1
    said = capsys.readouterr().err
    assert "owned" in said and not set("\x1b\x07\u202e\ud800") & set(said)


@pytest.mark.parametrize(
    "content", ["a = " + "[" * 100_000, "a = " + "9" * 10_000, "x" * 2_000_000, "\x00", "steps = 1\nsteps = 2"]
)
def test_settings_of_any_content_are_refused_in_one_line(tmp_path, capsys, content):
    (tmp_path / "job.toml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "job.toml")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "job.toml" in said and len(said) < 1500


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "missing"])
def test_settings_that_are_no_file_are_refused_and_not_waited_for(tmp_path, capsys, kind):
    place = tmp_path / "job.toml"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    path = "/dev/zero" if kind == "zero" else str(place)
    assert main(["train", "--config", path]) == 2
    assert "cannot be read" in capsys.readouterr().err
