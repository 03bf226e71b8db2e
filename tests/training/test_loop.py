"""The training loop: the loss is the textbook one, a step is what its config says, and a run leaves what it promises."""

import dataclasses
import itertools
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import minilora
import minilora.training.loop as loop
from minilora import LoraConfig, MiniLoraError, QuantConfig, inject, load_adapter, quantize_model
from minilora.data.batches import collate, micro_batches
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.training.loop import TrainConfig, train
from minilora.training.losses import evaluate, token_losses
from minilora.training.memory import memory_mb
from minilora.training.schedule import learning_rate
from tests.models import Words

PAD = 63
STEP_KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "rss_mb", "seconds"}


def example(length, asked, seed):
    """``length`` random tokens of which the first ``asked`` do not count."""
    tokens = torch.randint(2, PAD, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(tuple(tokens), tuple([IGNORED] * asked + tokens[asked:]))


EXAMPLES = [example(length, asked, i) for i, (length, asked) in enumerate([(9, 3), (5, 1), (14, 8), (7, 0)])]
BATCHES = {
    "one": [EXAMPLES[0]],
    "different lengths": EXAMPLES,
    "gaps": [Encoded((4, 5, 6, 7, 8), (IGNORED, 5, IGNORED, IGNORED, 8)), Encoded((9, 3, 2), (IGNORED, IGNORED, 2))],
    "last token only": [Encoded((4, 5, 6), (IGNORED, IGNORED, 6)), Encoded((4, 5, 6, 7, 8, 9), (IGNORED,) * 5 + (9,))],
}


PLAIN = partial(Words, vocabulary=64, width=16, inner=24)  # no transformers, and the vocabulary of the examples


def loss_by_the_book(model, batch):
    """Cross-entropy over the whole logits, token by token: what ``token_losses`` must give."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return rows[batch["labels"][:, 1:] != IGNORED]


@pytest.fixture
def adapted(make_llama):
    """``adapted(**lora fields)``: a tiny Llama with a fresh adapter on every linear layer, the same each time."""

    def make(**fields):
        model = make_llama(0, vocab_size=64)
        torch.manual_seed(11)
        lora = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
        return inject(model, LoraConfig(**lora))

    return make


def run(model, folder, examples=EXAMPLES, evaluation=(), sample=None, watch=None, overwrite=False, **fields):
    fields = {"steps": 4, "batch_size": 2, "lr": 0.01, "warmup": 0.0} | fields
    return train(model, examples, TrainConfig(**fields), folder, PAD, evaluation, sample, watch, overwrite=overwrite)


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def bytes_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# ---- the config

BAD_FIELDS = [
    *itertools.product(
        ("steps", "batch_size", "accumulate", "keep_checkpoints", "max_skipped"), (0, -1, 2.0, "3", None, True)
    ),
    *itertools.product(("seed", "eval_every", "save_every", "profile"), (-1, 1.5, "0", None, False)),
    *itertools.product(("lr", "warmup", "weight_decay"), (-1e-9, 1, 1.0, math.nan, math.inf, "0.1", None, True)),
    *itertools.product(("clip",), (-0.1, math.nan, math.inf, "1", None, True)),
    ("lr", 0),
    ("lr", 0.0),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=[f"{n}={v!r}" for n, v in BAD_FIELDS])
def test_a_value_that_cannot_be_meant_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}=") as caught:
        TrainConfig(**{name: value})
    assert isinstance(caught.value, MiniLoraError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"steps": 1, "batch_size": 1, "accumulate": 1, "lr": 1e-12},
        {"warmup": 0, "weight_decay": 0, "clip": 0, "seed": 0},
        {"warmup": 0.999, "weight_decay": 0.999, "clip": 1e9, "lr": 0.999},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(fields):
    config = TrainConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


# ---- the schedule


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (10, 0.4, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 7: 0.5, 9: 0.5 * (1 + math.cos(math.pi * 5 / 6))}),
        (10, 0.0, {0: 1.0, 1: 1.0, 9: 0.5 * (1 + math.cos(math.pi * 8 / 9))}),
        (1, 0.0, {0: 1.0}),
        (1, 0.1, {0: 1.0}),
        (60, 0.1, {0: 1 / 6, 5: 1.0, 6: 1.0, 33: 0.5}),
        (3, 0.9, {0: 1 / 3, 1: 2 / 3, 2: 1.0}),
    ],
)
def test_learning_rate(steps, warmup, expected):
    config = TrainConfig(steps=steps, warmup=warmup, lr=0.02)
    for step, share in expected.items():
        assert learning_rate(config, step) == pytest.approx(0.02 * share, rel=1e-12), step


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_rate_rises_to_the_peak_and_falls_without_reaching_zero(steps, warmup):
    rates = [learning_rate(TrainConfig(steps=steps, warmup=warmup, lr=0.02), step) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == 0.02
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(0 < rate <= 0.02 for rate in rates)


# ---- the loss


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("keeps", [True, False], ids=["logits_to_keep", "all logits"])
def test_token_losses_are_those_of_the_full_logits(adapted, randomize, keeps, name):
    model = randomize(adapted()) if keeps else PLAIN()
    batch = collate(BATCHES[name], PAD)
    losses, wanted = token_losses(model, batch), loss_by_the_book(model, batch)
    assert losses.dtype == torch.float32 and losses.dim() == 1
    assert len(losses) == sum(e.supervised for e in BATCHES[name]) > 0
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)


def test_only_the_needed_logits_are_computed(adapted):
    model, seen = adapted(), []
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    token_losses(model, collate(BATCHES["gaps"], PAD))
    assert seen == [3]  # of five positions


def test_token_losses_agree_with_the_loss_of_transformers(adapted, randomize):
    model, batch = randomize(adapted()), collate(EXAMPLES, PAD)
    torch.testing.assert_close(token_losses(model, batch).mean(), model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_token_losses_are_fp32_for_a_bfloat16_model(make_llama):
    model = make_llama(0).to(torch.bfloat16)
    assert token_losses(model, collate(EXAMPLES, PAD)).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 4, 99])
def test_evaluate_weighs_every_token_alike(adapted, randomize, size):
    model = randomize(adapted())
    wanted = torch.cat([loss_by_the_book(model, collate([e], PAD)) for e in EXAMPLES]).mean().item()
    assert evaluate(model, EXAMPLES, size, PAD) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_turns_dropout_off_and_leaves_the_mode_as_it_was(adapted, randomize, training):
    model = randomize(adapted(lora_dropout=0.5)).train(training)
    losses = {evaluate(model, EXAMPLES, 2, PAD) for _ in range(3)}
    assert len(losses) == 1
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_restores_the_mode_after_an_error(adapted):
    model = adapted().train()
    with pytest.raises(IndexError):
        evaluate(model, [Encoded((1, 999), (IGNORED, 999))], 1, PAD)
    assert model.training


# ---- one step


@pytest.mark.parametrize("plain", [False, True], ids=["llama", "plain"])
@pytest.mark.parametrize(("size", "accumulate"), [(2, 2), (1, 4)])
def test_cutting_a_batch_in_pieces_changes_nothing(adapted, tmp_path, monkeypatch, size, accumulate, plain):
    def made():
        if not plain:
            return adapted()
        torch.manual_seed(5)
        return inject(PLAIN(), LoraConfig(r=4, lora_alpha=12, target_modules=["mid", "head"]))

    # The same four examples in the same order, however they are cut.
    def in_order(examples, batch_size, seed, start=0):
        for i in itertools.count(start):
            yield [examples[j % 4] for j in range(i * batch_size, (i + 1) * batch_size)]

    monkeypatch.setattr(loop, "micro_batches", in_order)
    whole, cut = made(), made()
    first = run(whole, tmp_path / "whole", batch_size=4, steps=3, lr=1e-3, clip=0.5)
    second = run(cut, tmp_path / "cut", batch_size=size, accumulate=accumulate, steps=3, lr=1e-3, clip=0.5)
    weights = trained_weights(cut)
    for name, weight in trained_weights(whole).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"] == sum(len(e.input_ids) for e in EXAMPLES)


def test_the_steps_are_those_of_a_loop_written_by_hand(adapted, tmp_path):
    model, twin = adapted(), adapted()
    config = {"steps": 5, "batch_size": 2, "lr": 0.02, "warmup": 0.4, "weight_decay": 0.1, "clip": 0.7, "seed": 3}
    records = run(model, tmp_path, **config)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=123.0, weight_decay=0.1)
    for record, batch in zip(records, micro_batches(EXAMPLES, 2, 3), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(TrainConfig(**config), record["step"] - 1)
        loss = loss_by_the_book(twin, collate(batch, PAD)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    weights = trained_weights(twin)
    for name, weight in trained_weights(model).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 0.05, 1e6])
def test_clipping_bounds_the_norm(adapted, tmp_path, monkeypatch, clip):
    applied = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **options):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        applied.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    records = run(adapted(), tmp_path, clip=clip)
    assert len(applied) == len(records) == 4
    for norm, record in zip(applied, records, strict=True):
        wanted = min(record["grad_norm"], clip) if clip else record["grad_norm"]  # logged as it was before clipping
        assert norm == pytest.approx(wanted, rel=1e-3)
    assert max(record["grad_norm"] for record in records) > 0.1


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_only_the_adapter_changes(make_llama, tmp_path, quant):
    model = make_llama(0)
    if quant:
        quantize_model(model, QuantConfig(quant, double_quant=True))
    model = inject(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    run(model, tmp_path)
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == own
    assert own and all("lora_" in name for name in own)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_loss_goes_down_on_a_set_that_can_be_remembered(adapted, tmp_path):
    records = run(adapted(), tmp_path, steps=40, batch_size=4, lr=0.02, warmup=0.1)
    losses = [record["loss"] for record in records]
    assert losses[0] > 3 and losses[-1] < 0.4 * losses[0]


# ---- what a run leaves


def test_every_record_is_a_line_of_the_log_and_is_watched(adapted, tmp_path):
    folder, watched = tmp_path / "runs" / "one", []
    records = run(adapted(), folder, evaluation=EXAMPLES[:2], watch=watched.append, steps=5, eval_every=2)
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == records == watched
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    for number, record in enumerate(steps):
        assert set(record) == STEP_KEYS
        assert record["lr"] == learning_rate(TrainConfig(steps=5, lr=0.01, warmup=0.0), number)
        assert record["tokens_per_s"] > 0 and record["rss_mb"] > 1 and record["grad_norm"] > 0
    assert [r["seconds"] for r in steps] == sorted(r["seconds"] for r in steps)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-5",
        "log.jsonl",
        "minilora.json",
    ]


def test_a_second_run_is_refused_or_told_to_replace_the_first(adapted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run(adapted(), tmp_path, steps=5, save_every=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"holds a run already \(checkpoint-5\); go on with it by --resume"):
        run(adapted(), tmp_path, steps=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(adapted(), tmp_path, steps=2, overwrite=True)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_of_nothing_is_a_run_like_any_other(adapted, tmp_path):
    run(adapted(), tmp_path / "new", steps=2, overwrite=True)
    assert (tmp_path / "new" / "adapter_model.safetensors").exists()


def test_a_folder_with_other_files_is_no_run(adapted, tmp_path):
    (tmp_path / "job.toml").write_text("steps = 2")
    run(adapted(), tmp_path, steps=2)
    assert (tmp_path / "job.toml").read_text() == "steps = 2"


@pytest.mark.parametrize(
    ("eval_every", "at"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (9, [0, 5])]
)
def test_evaluations_come_first_last_and_in_between(adapted, tmp_path, eval_every, at):
    records = run(adapted(), tmp_path, evaluation=EXAMPLES[:1], steps=5, eval_every=eval_every)
    assert [record["step"] for record in records if "eval_loss" in record] == at


def test_no_evaluation_without_data_for_it(adapted, tmp_path):
    asked = []
    records = run(adapted(), tmp_path, eval_every=1, sample=lambda: asked.append(1) or ("p", "a"))
    assert [set(record) for record in records] == [STEP_KEYS] * 4
    assert not asked


def test_an_evaluation_is_that_of_the_model_at_that_step_and_has_the_sample(adapted, tmp_path):
    model, seen = adapted(), []

    def sample():
        seen.append((evaluate(model, EXAMPLES[:3], 1, PAD), model.training))
        return "how?", f"so {len(seen)}"

    records = [r for r in run(model, tmp_path, evaluation=EXAMPLES[:3], sample=sample, eval_every=2) if "prompt" in r]
    assert [(r["step"], r["prompt"], r["answer"]) for r in records] == [
        (0, "how?", "so 1"),
        (2, "how?", "so 2"),
        (4, "how?", "so 3"),
    ]
    for record, (loss, training) in zip(records, seen, strict=True):
        assert set(record) == {"step", "eval_loss", "prompt", "answer"}
        assert record["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert training  # the loop's mode: the sample itself decides about dropout
    assert len({record["eval_loss"] for record in records}) == 3


def test_evaluations_do_not_change_the_training(adapted, tmp_path):
    run(adapted(lora_dropout=0.3), tmp_path / "without", steps=4)
    run(adapted(lora_dropout=0.3), tmp_path / "with", evaluation=EXAMPLES, eval_every=1, steps=4)
    assert bytes_of(tmp_path / "without") == bytes_of(tmp_path / "with")


def test_the_model_trains_in_train_mode_and_ends_in_eval_mode(adapted, tmp_path):
    model, modes = adapted(), []
    record = run(model, tmp_path, watch=lambda _: modes.append(model.training), evaluation=EXAMPLES[:1], eval_every=1)
    assert modes == [True] * len(record)
    assert not model.training


@pytest.mark.parametrize(("save_every", "at"), [(0, [5]), (2, [4, 5]), (3, [3, 5]), (5, [5]), (6, [5]), (1, [4, 5])])
def test_checkpoints_load_back(adapted, make_llama, tmp_path, ids, save_every, at):
    model, outputs = adapted(), {}

    def keep(record):
        # A record comes right before the save of its step.
        model.eval()
        outputs[record["step"]] = model(ids).logits.detach()
        model.train()

    run(model, tmp_path, watch=keep, steps=5, save_every=save_every)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in at]
    for step, folder in [*((step, f"checkpoint-{step}") for step in at), (5, ".")]:
        loaded = make_llama(0)
        load_adapter(loaded, tmp_path / folder)
        loaded.eval()
        assert torch.equal(loaded(ids).logits, outputs[step])
    assert not torch.equal(outputs[1], outputs[5])


# ---- repeatable


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_seed_gives_one_file_whatever_ran_before(adapted, tmp_path, dropout):
    for name, noise in (("a", 1), ("b", 2)):
        model = adapted(lora_dropout=dropout)
        torch.manual_seed(noise)
        run(model, tmp_path / name, seed=5)
    model = adapted(lora_dropout=dropout)
    run(model, tmp_path / "c", seed=6)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") != bytes_of(tmp_path / "c")


# The two names that transformers has for it: the older one is gone in its version 6.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_memory_only(adapted, tmp_path):
    plain, saving, forwards = adapted(lora_dropout=0.2), adapted(lora_dropout=0.2), {}
    for name, model in (("plain", plain), ("saving", saving)):
        forwards[name] = []
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, seen=forwards[name]: seen.append(1) if torch.is_grad_enabled() else None
        )
        run(model, tmp_path / name, gradient_checkpointing=name == "saving")
    assert len(forwards["saving"]) == 2 * len(forwards["plain"]) == 8  # computed again in the backward pass
    weights = trained_weights(saving)
    for name, weight in trained_weights(plain).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def test_gradient_checkpointing_asks_by_the_name_that_stays(adapted, tmp_path):
    run(adapted(), tmp_path, gradient_checkpointing=True)


# ---- what goes wrong


def test_gradient_checkpointing_needs_a_model_that_can(tmp_path):
    model = inject(PLAIN(), LoraConfig(r=2, target_modules=["mid"]))
    with pytest.raises(StateError, match="Words cannot checkpoint its activations"):
        run(model, tmp_path, gradient_checkpointing=True)


@pytest.mark.parametrize("frozen", ["base", "loaded"])
def test_nothing_to_train_is_an_error_before_anything_is_written(adapted, make_llama, tmp_path, frozen):
    model = make_llama(0).requires_grad_(False)
    if frozen == "loaded":
        minilora.save_adapter(adapted(), tmp_path / "adapter")
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(StateError, match=r"no parameter requires grad.*is_trainable=True"):
        run(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_not_saved(adapted, tmp_path):
    model = adapted()

    def poison(record):
        if record["step"] == 4:  # after the last loss was looked at
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)

    with pytest.raises(StateError, match="holds NaN or infinity"):
        run(model, tmp_path, watch=poison)
    assert not (tmp_path / "adapter_model.safetensors").exists()


# ---- memory


def test_memory_is_counted_in_megabytes_of_a_million_bytes():
    resource = pytest.importorskip("resource")
    now, peak = memory_mb(), memory_mb(peak=True)
    assert 50 < now < 1e5
    assert peak >= now * 0.9
    if not torch.cuda.is_initialized():
        ballast = torch.ones(50_000_000, dtype=torch.uint8)
        assert memory_mb() - now == pytest.approx(50, abs=15)
        del ballast
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
