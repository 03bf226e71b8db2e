"""minilora.hf.LoraTrainer, TRL's trainer, the plain Trainer and torch.compile on a tiny adapted Llama."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import peft
import transformers
from safetensors.torch import load_file

import minilora
from minilora.hf import LoraTrainer, LoraTrainerMixin
from minilora.store.load import adapter_state_dict

# torch's data loader asks for pinned memory, which a machine without a GPU does not have.
PINNED = "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning"
# TRL sets the old names of transformers' arguments.
OLD_NAME = "ignore:`gradient_checkpointing(_kwargs|_enable)?` is deprecated:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in (PINNED, OLD_NAME)]

SOME = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": {},
    "quantized": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "bias and copies": {"bias": "all", "modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5, 60]},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def build(build_model):
    """``build(kind, seed)``: a tiny adapted Llama, its adapter drawn from the seed."""

    def make(kind, seed=0, **more):
        model = build_model("llama")
        if kind.startswith("quantized"):
            minilora.quantize_model(model)
        torch.manual_seed(seed)
        fields = {"r": 4, "lora_alpha": 12, "target_modules": SOME, "task_type": "CAUSAL_LM", **KINDS[kind], **more}
        return minilora.get_peft_model(model, minilora.LoraConfig(**fields))

    return make


@pytest.fixture(scope="module")
def rows():
    """Fourteen examples of ten tokens."""
    ids = torch.randint(0, 64, (14, 10), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def fit(rows, tmp_path):
    """``fit(model, folder, resume, **arguments)``: train six steps of two rows; the trainer."""

    def run(model, folder="run", resume=None, trainer=LoraTrainer, more=None, **arguments):
        given = {
            "output_dir": str(tmp_path / folder), "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2,
            "learning_rate": 5e-3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 7,
        }  # fmt: skip
        args = transformers.TrainingArguments(**{**given, **arguments})
        made = trainer(model=model, args=args, train_dataset=rows, **(more or {}))
        made.train(resume_from_checkpoint=resume if resume in (None, True) else str(resume))
        return made

    return run


def tensors_of(model, name="default"):
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, name).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and wanted
    differ = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not differ


def differ_everywhere(one, other, but=()):
    """Whether every tensor changed, so that a comparison above could have failed."""
    return all(not torch.equal(one[key], other[key]) for key in one if not any(word in key for word in but))


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Resuming


@every_kind
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(build, fit, tmp_path, kind):
    whole = build(kind)
    start = tensors_of(whole)
    first = fit(whole)
    half = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    again = build(kind, seed=1)  # another start, which the checkpoint has to replace
    second = fit(again, "again", tmp_path / "run" / "checkpoint-3")
    assert_same(tensors_of(again), tensors_of(whole))
    assert losses_of(second)[-3:] == losses_of(first)[-3:]
    assert differ_everywhere(tensors_of(whole), half) and differ_everywhere(half, start)


def test_run_that_starts_anew_does_not_equal_the_uninterrupted_one(build, fit):
    """The check above can fail."""
    whole, other = build("lora"), build("lora", seed=1)
    fit(whole)
    fit(other, "again")
    assert differ_everywhere(tensors_of(whole), tensors_of(other))


def test_base_is_the_same_after_training_and_resuming(build, build_model, fit, tmp_path):
    fit(build("lora"))
    model = build("lora", seed=1)
    fit(model, "again", tmp_path / "run" / "checkpoint-3")
    assert_same(model.unload().state_dict(), build_model("llama").state_dict())


def test_resuming_finds_the_last_checkpoint_of_the_folder(build, fit):
    reference, interrupted, model = build("lora"), build("lora"), build("lora", seed=1)
    fit(reference, "reference", lr_scheduler_type="constant")
    fit(interrupted, max_steps=3, lr_scheduler_type="constant")
    trainer = fit(model, resume=True, lr_scheduler_type="constant")
    assert trainer.state.global_step == 6
    assert_same(tensors_of(model), tensors_of(reference))


def test_several_adapters_train_and_resume_in_one_run(build, fit, tmp_path):
    def two(seed):
        model = build("lora", seed)
        fields = {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        model.add_adapter("two", minilora.LoraConfig(**fields))
        model.set_adapter(["default", "two"])
        return model

    whole, again = two(0), two(1)
    start = tensors_of(whole, "two")
    fit(whole)
    assert (tmp_path / "run" / "checkpoint-3" / "two" / "adapter_model.safetensors").is_file()
    fit(again, "again", tmp_path / "run" / "checkpoint-3")
    for name in ("default", "two"):
        assert_same(tensors_of(again, name), tensors_of(whole, name))
    assert differ_everywhere(tensors_of(whole, "two"), start)


def test_adapter_that_is_not_active_is_saved_restored_and_not_trained(build, fit, tmp_path):
    model = build("lora")
    model.add_adapter(
        "two", minilora.LoraConfig(r=2, lora_alpha=7, target_modules=["up_proj"], init_lora_weights=False)
    )
    before = tensors_of(model, "two")
    fit(model)
    again = build("lora", seed=1)
    again.add_adapter(
        "two", minilora.LoraConfig(r=2, lora_alpha=7, target_modules=["up_proj"], init_lora_weights=False)
    )
    assert differ_everywhere(tensors_of(again, "two"), before)
    fit(again, "again", tmp_path / "run" / "checkpoint-3")
    for each in (model, again):
        assert_same(tensors_of(each, "two"), before)
    assert_same(tensors_of(again), tensors_of(model))


@pytest.mark.parametrize("damage", ["missing", "other rank"])
def test_checkpoint_that_does_not_fit_is_refused(build, fit, tmp_path, damage):
    fit(build("lora"))
    folder = tmp_path / "run" / "checkpoint-3"
    if damage == "missing":
        (folder / "adapter_model.safetensors").unlink()
    model = build("lora", seed=1, r=4 if damage == "missing" else 2)
    before = tensors_of(model)
    with pytest.raises(minilora.MiniLoraError, match=r"adapter_model\.safetensors"):
        fit(model, "again", folder)
    assert_same(tensors_of(model), before)


# The best checkpoint


@pytest.mark.parametrize("kind", ["lora", "quantized", "pissa", "dora", "bias and copies"])
@pytest.mark.parametrize(("scores", "best"), [([1, 3, 2], 4), ([3, 1, 2], 2), ([1, 2, 3], 6)])
def test_best_model_at_the_end_is_the_best_checkpoint(build, fit, rows, tmp_path, kind, scores, best):
    left = list(scores)
    more = {"eval_dataset": rows[:2], "compute_metrics": lambda _: {"score": left.pop(0)}}
    chosen = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    model = build(kind)
    trainer = fit(model, more=more, eval_strategy="steps", eval_steps=2, save_steps=2, **chosen)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and not left
    saved = {
        step: load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4, 6)
    }
    assert_same(tensors_of(model), saved[best])
    assert all(differ_everywhere(saved[best], saved[step]) for step in (2, 4, 6) if step != best)


# What a checkpoint holds


@pytest.mark.parametrize("kind", ["lora", "pissa", "olora", "dora", "dropout", "bias and copies", "tokens"])
def test_every_checkpoint_opens_in_peft_with_equal_logits(build, build_model, fit, token_ids, tmp_path, kind):
    model = build(kind)
    fit(model, save_steps=2)
    seen = []
    for step in (2, 4, 6):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        theirs = peft.PeftModel.from_pretrained(build_model("llama"), folder)
        ours = minilora.PeftModel.from_pretrained(build_model("llama"), folder)
        seen.append(logits(ours, token_ids))
        torch.testing.assert_close(seen[-1], logits(theirs, token_ids), rtol=0, atol=5e-6)
    torch.testing.assert_close(seen[-1], logits(model, token_ids), rtol=0, atol=1e-6)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", ["lora", "quantized", "dora"])
def test_checkpoint_holds_the_adapter_and_no_base_weight(build, fit, tmp_path, kind):
    model = build(kind)
    fit(model)
    size = sum(tensor.numel() * 4 for tensor in tensors_of(model).values())
    base = sum(p.numel() * p.element_size() for p in model.unload().parameters())
    for step in (3, 6):
        files = {file.name: file.stat().st_size for file in (tmp_path / "run" / f"checkpoint-{step}").rglob("*")}
        weights = [name for name in files if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
        assert not {"model.safetensors", "pytorch_model.bin"} & files.keys()
        assert {"adapter_config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt"} <= files.keys()
        assert size < files["adapter_model.safetensors"] < size + 8_000  # its header
        assert files["optimizer.pt"] < 2 * size + 40_000  # two moments of the adapter, and pickle around each
        kept = sum(files[name] for name in weights if not name.startswith(("rng_state", "optimizer", "scheduler")))
        assert kept - files["adapter_model.safetensors"] < 10_000 < base


def test_saved_model_is_the_adapter(build, build_model, fit, token_ids, tmp_path):
    model = build("lora")
    fit(model).save_model(str(tmp_path / "final"))
    assert {file.name for file in (tmp_path / "final").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "minilora.json", "training_args.bin",
    }  # fmt: skip
    loaded = minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path / "final")
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


# The same training elsewhere


def test_plain_trainer_trains_and_saves_only_the_adapter(build, build_model, fit, token_ids, tmp_path):
    plain, ours = build("lora"), build("lora")
    start = tensors_of(plain)
    fit(plain, "plain", trainer=transformers.Trainer)
    fit(ours)
    assert_same(tensors_of(plain), tensors_of(ours))
    assert differ_everywhere(tensors_of(plain), start)
    plain.save_pretrained(tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "minilora.json",
    }
    assert not list((tmp_path / "plain").rglob("model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "final")
    torch.testing.assert_close(logits(theirs, token_ids), logits(plain, token_ids), rtol=0, atol=2e-6)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_trainer_trains_as_it_trains_a_model_of_peft(build, build_model, fit, fields):
    ours = build("lora", **fields)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=SOME, task_type="CAUSAL_LM", **fields)
    theirs = peft.get_peft_model(build_model("llama"), config)
    found = fit(ours)
    wanted = fit(theirs, "theirs", trainer=transformers.Trainer)
    assert losses_of(found) == pytest.approx(losses_of(wanted), abs=2e-5)
    assert found.state.global_step == 6 and losses_of(found)[0] != losses_of(found)[-1]
    kept = peft.get_peft_model_state_dict(theirs)
    for key, tensor in tensors_of(ours).items():
        torch.testing.assert_close(tensor, kept[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("kind", ["lora", "quantized", "dora", "pissa", "dropout"])
def test_activation_checkpointing_gives_the_same_weights(build, fit, kind):
    """transformers 5.24 calls it activation_checkpointing; gradient_checkpointing is the old name."""
    plain, saving = build(kind), build(kind)
    fit(plain)
    trainer = fit(saving, "saving", activation_checkpointing=True)
    assert trainer.model.is_activation_checkpointing
    assert_same(tensors_of(saving), tensors_of(plain))


@pytest.mark.parametrize("arguments", [{"bf16": True}, {"gradient_accumulation_steps": 2}], ids=["bf16", "accumulated"])
def test_resuming_is_exact_in_other_modes_too(build, fit, tmp_path, arguments):
    whole, again = build("lora"), build("lora", seed=1)
    fit(whole, **arguments)
    fit(again, "again", tmp_path / "run" / "checkpoint-3", **arguments)
    assert_same(tensors_of(again), tensors_of(whole))


# TRL

WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "dog",
    "run",
    "to",
    "his",
]


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def sft(tokenizer, tmp_path):
    """``sft(model, folder, resume)``: two steps of TRL's trainer with minilora's mixin."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = [" ".join(WORDS[3 + (place * step) % 13] for step in range(1, 9)) for place in range(1, 7)]
    dataset = datasets.Dataset.from_list([{"text": text} for text in texts])

    class Trainer(LoraTrainerMixin, trl.SFTTrainer):
        """What the mixin's docstring promises."""

    def run(model, folder, resume=None, **arguments):
        args = trl.SFTConfig(
            output_dir=str(tmp_path / folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, learning_rate=5e-3,
            use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, max_length=16, **arguments,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume if resume in (None, True) else str(resume))
        return trainer

    return run


def test_sft_trainer_with_the_mixin_trains_resumes_and_opens_in_peft(build, build_model, sft, token_ids, tmp_path):
    whole, again = build("lora"), build("lora", seed=1)
    start = tensors_of(whole)
    trainer = sft(whole, "run")
    assert trainer.state.global_step == 2 and differ_everywhere(tensors_of(whole), start)
    folder = tmp_path / "run" / "checkpoint-1"
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    sft(again, "again", folder)
    assert_same(tensors_of(again), tensors_of(whole))
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "run" / "checkpoint-2")
    torch.testing.assert_close(logits(theirs, token_ids), logits(whole, token_ids), rtol=0, atol=2e-6)
    assert differ_everywhere(load_file(folder / "adapter_model.safetensors"), tensors_of(whole))


def test_sft_trainer_trains_a_quantized_base(build, sft):
    model = build("quantized")
    start = tensors_of(model)
    trainer = sft(model, "run")
    assert differ_everywhere(tensors_of(model), start)
    assert all(0 < loss < 20 for loss in losses_of(trainer))


# torch.compile


COMPILED = {
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "pissa": ("pissa", {}),
    "nf4": ("quantized", {}),
    "nf4 dora": ("quantized", {"use_dora": True}),
    "tokens": ("tokens", {}),
}


def step(model, call, ids):
    """Loss and gradients of one backward, the generator at a fixed place."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def compiler():
    """A compiler without code of other tests, which counts its graphs and breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_model_has_one_graph_and_the_gradients_of_the_eager_one(build, compiler, token_ids, name):
    kind, fields = COMPILED[name]
    model = build(kind, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = step(model, model, token_ids)
    compiled = compiler(model)
    found = step(model, compiled, token_ids)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for key, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)
        assert gradient.abs().max() > 0


@pytest.mark.slow
def test_compiled_model_trains_on_without_compiling_again(build, compiler, token_ids):
    model = build("lora")
    compiled = compiler(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(step(model, compiled, token_ids)[0].item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
