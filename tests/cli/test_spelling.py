"""Words of other programs: those that mean exactly one of ours are taken and noted once, others answered with the right one."""

import pytest

from minilora.cli import COMMANDS, main, make_parser, spelling
from minilora.cli.spelling import closest, in_our_words, meant
from minilora.cli.train import job_of, settings

BASIC = ["train", "--model", "m", "--data", "d", "--out", "o"]


def job(*more):
    return job_of(make_parser().parse_args([*BASIC, *more]))


TAKEN = {
    "--learning-rate 0.5": ("--lr 0.5", "--learning-rate is --lr here"),
    "--learning_rate=0.5": ("--lr 0.5", "--learning_rate is --lr here"),
    "--num-train-epochs 2": ("--epochs 2", "--num-train-epochs is --epochs here"),
    "--per-device-train-batch-size 2": ("--batch-size 2", "--per-device-train-batch-size is --batch-size here"),
    "--gradient_accumulation_steps 2": ("--accumulate 2", "--gradient_accumulation_steps is --accumulate here"),
    "--lora-r 4": ("--r 4", "--lora-r is --r here"),
    "--alpha 4": ("--lora-alpha 4", "--alpha is --lora-alpha here"),
    "--lora_alpha 4": ("--lora-alpha 4", "--lora_alpha is --lora-alpha here"),
    "--warmup_steps 3": ("--warmup 3", "--warmup_steps is --warmup here"),
    "--lr-scheduler-type linear": ("--schedule linear", "--lr-scheduler-type is --schedule here"),
    "--bf16": ("--dtype bfloat16", "--bf16 is --dtype bfloat16 here"),
    "--bf16 True": ("--dtype bfloat16", "--bf16 is --dtype bfloat16 here"),
    "--load-in-4bit": ("--quant nf4", "--load-in-4bit is --quant nf4 here"),
    "--load_in_8bit=true": ("--quant int8", "--load_in_8bit is --quant int8 here"),
    "--eval-steps 2 --load_best_model_at_end True": ("--eval-every 2 --keep-best", "--load_best_model_at_end is --keep-best here"),
    "--overwrite_output_dir false": ("--no-overwrite", "--overwrite_output_dir is --overwrite here"),
}  # fmt: skip


@pytest.mark.parametrize("words", TAKEN)
def test_an_exact_synonym_works_and_is_noted_once(capsys, words):
    ours, note = TAKEN[words]
    found = job(*words.split())
    said = capsys.readouterr()
    assert said.err.splitlines().count(note) == 1 and not said.out
    assert found == job(*ours.split()) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("--gradient-checkpointing true", "--gradient-checkpointing"),
        ("--gradient-checkpointing=False --lr 0.5", "--no-gradient-checkpointing --lr 0.5"),
        ("--gradient_checkpointing True", "--gradient-checkpointing"),
        ("--gradient-checkpointing --lr 0.5", "--gradient-checkpointing --lr 0.5"),
    ],
)
def test_a_switch_takes_true_and_false(words, same):
    assert job(*words.split()) == job(*same.split())


def test_the_keys_of_a_file_too(capsys, tmp_path):
    file = tmp_path / "job.toml"
    file.write_text("alpha = 4\nlearning_rate = 0.5\nbf16 = true\nlora-dropout = 0.1\nnum_train_epochs = 2\n")
    found = job("--config", str(file))
    assert found == job(
        *["--lora-alpha", "4", "--lr", "0.5", "--dtype", "bfloat16", "--lora-dropout", "0.1", "--epochs", "2"]
    )
    notes = capsys.readouterr().err.splitlines()
    assert "alpha is lora_alpha here" in notes and "bf16 is dtype = 'bfloat16' here" in notes and len(notes) == 5


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--lr 1e-3 --learning-rate 1e-3", "--learning-rate and --lr are one setting here; give one of them"),
        ("--alpha 1 --lora_alpha 2", "--lora_alpha and --lora-alpha are one setting here"),
        ("--bf16 False", "--bf16 False: it is --dtype bfloat16 here; leave it out, or give --dtype"),
        ("--bf16=yes", "--bf16 yes: it is --dtype bfloat16 here"),
        ("--learning-rat 1", "--learning-rat: unknown flag; the closest are '--lr'"),
        ("--packing", "--packing: unknown flag; the closest are '--pack'"),
        ("--lr-scheduler-type polynomial", "schedule='polynomial': wanted one of cosine, linear, constant, wsd"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_right_flag(capsys, words, line):
    assert main([*BASIC, *words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"minilora: {line}")


@pytest.mark.parametrize(("text", "words"), [
    ("bf16 = false\n", "bf16 = False: it is dtype = 'bfloat16' here"),
    ("lr = 0.1\nlearning_rate = 0.1\n", "learning_rate and lr are one setting here"),
])  # fmt: skip
def test_a_file_with_both_names_is_refused(capsys, tmp_path, text, words):
    (tmp_path / "job.toml").write_text(text)
    assert main([*BASIC, "--config", str(tmp_path / "job.toml")]) == 2
    assert words in capsys.readouterr().err


def test_another_process_than_the_first_says_no_note(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    job("--learning-rate", "0.5")
    assert capsys.readouterr().err == ""


def test_a_prompt_is_no_flag():
    known = make_parser().commands["generate"].load()._option_string_actions
    assert in_our_words(["--", "--max-tokens"], known) == ["--", "--max-tokens"]
    assert in_our_words(["--max-tokens", "3", "a"], known) == ["--max-new-tokens", "3", "a"]


def test_every_name_of_the_table_is_one_of_ours():
    """A flag that is renamed takes its synonyms along."""
    flags = {flag[2:] for name in COMMANDS for flag in make_parser().commands[name].load()._option_string_actions}
    values = {name for name, _ in spelling._SWITCHES.values()} | set(spelling._SYNONYMS.values())
    assert values <= flags
    assert not set(spelling._SYNONYMS) & {name.replace("_", "-") for name in settings()}
    assert set(spelling._NEAR.values()) <= flags | set(COMMANDS)


def test_the_nearest_of_a_word_that_is_near_a_synonym():
    assert closest("lerning_rate", ["lr", "r"]) == "'lr'" and meant("lerning_rate", ["lr"]) is None
