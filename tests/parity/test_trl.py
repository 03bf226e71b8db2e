"""TRL's trainers on adapted models: their reference is the model itself as it began, and ``peft_config`` may be minilora's."""

import gc
import math
import pathlib
import types
import weakref

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")
pytest.importorskip("tokenizers")

import datasets
import peft
import tokenizers
import transformers
import trl

import minilora
from minilora.hf import LoraTrainerMixin, Reference, reference
from minilora.lora.slots import adapters_of
from minilora.many.frozen import changes_nothing
from minilora.store.load import adapter_state_dict

# torch's data loader asks for pinned memory, which a machine without a GPU does not have; the rest is TRL's own.
PINNED = "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning"
OLD_NAME = "ignore:`gradient_checkpointing(_kwargs|_enable|_disable)?` is deprecated:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in (PINNED, OLD_NAME)]

SOME = ["q_proj", "v_proj", "down_proj"]
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
PREFERENCE = ("dpo", "kto", "grpo", "rloo")
every_trainer = pytest.mark.parametrize("kind", PREFERENCE)


def lora(**fields):
    return minilora.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": SOME, "task_type": "CAUSAL_LM", **fields})


@pytest.fixture
def build(build_model):
    """``build(trained, seed)``: a tiny adapted Llama; ``trained``: its adapter has learnt something."""

    def make(trained=False, seed=0, **fields):
        torch.manual_seed(seed)
        model = minilora.get_peft_model(build_model("llama"), lora(**fields))
        if trained:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def tokenizer():
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(place):
    return " ".join(WORDS[3 + (place * step) % 13] for step in range(1, 6))


def reward(completions, **_):
    return [float(sum(map(ord, said)) % 7) for said in completions]


def trainer_of(kind, folder, steps=2, **more):
    """``(class, arguments by name)`` of one of TRL's trainers."""
    rows = range(1, 9)
    made = {
        "output_dir": str(folder), "max_steps": steps, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "seed": 7, **more,
    }  # fmt: skip
    if kind == "sft":
        data = [{"text": text(row)} for row in rows]
        return trl.SFTTrainer, {"args": trl.SFTConfig(**made), "train_dataset": datasets.Dataset.from_list(data)}
    if kind == "dpo":
        data = [{"prompt": text(row), "chosen": " " + text(row + 1), "rejected": " " + text(row + 2)} for row in rows]
        return trl.DPOTrainer, {"args": trl.DPOConfig(**made), "train_dataset": datasets.Dataset.from_list(data)}
    if kind == "kto":
        data = [{"prompt": text(row), "completion": " " + text(row + 1), "label": bool(row % 2)} for row in rows]
        return trl.KTOTrainer, {"args": trl.KTOConfig(**made), "train_dataset": datasets.Dataset.from_list(data)}
    made = {"beta": 0.1, "num_generations": 2, "max_completion_length": 6, **made}
    kinds = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
    data = datasets.Dataset.from_list([{"prompt": text(row)} for row in rows])
    return kinds[kind][0], {"args": kinds[kind][1](**made), "train_dataset": data, "reward_funcs": reward}


@pytest.fixture
def fit(tokenizer, tmp_path):
    """``fit(kind, model, folder, resume)``: steps of TRL's trainer with minilora's mixin; the trainer."""

    def run(kind, model, folder="run", resume=None, mixin=True, train=True, given=None, **more):
        cls, asked = trainer_of(kind, tmp_path / folder, **more)
        if mixin:
            cls = type("Trainer", (LoraTrainerMixin, cls), {})
        trainer = cls(model=model, processing_class=tokenizer, **asked, **(given or {}))
        if train:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return run


def tensors_of(model, name="default"):
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, name).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and wanted
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def of_the_first_step(trainer):
    return trainer.state.log_history[0]


def assert_began_at_its_reference(kind, entry):
    """What each loss and metric is where policy and reference say the same."""
    if kind == "dpo":
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert max(abs(entry["rewards/chosen"]), abs(entry["rewards/rejected"])) < 1e-6
    elif kind == "kto":
        assert (
            entry["loss"] == pytest.approx(0.5, abs=1e-6) and entry["kl"] == 0 and abs(entry["rewards/chosen"]) < 1e-6
        )
    else:
        assert entry["kl"] == 0


# The reference itself


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa_niter_2"}, {"bias": "all"}, {"lora_dropout": 0.2},
     {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}, {"use_rslora": True, "r": 3}],
    ids=["lora", "dora", "pissa", "bias", "dropout", "copies", "tokens", "rslora"],
)  # fmt: skip
def test_reference_stays_where_the_model_began(build, token_ids, fields, trained):
    model = build(trained, **fields).eval()
    began = logits(model, token_ids)
    ref = reference(model)
    assert torch.equal(ref(input_ids=token_ids).logits, began)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    now = logits(model, token_ids)
    assert not torch.allclose(now, began, atol=1e-3)
    assert torch.equal(ref.train()(input_ids=token_ids).logits, began)
    assert torch.equal(logits(model, token_ids), now) and model.active_adapters == ["default"]


def test_fresh_adapter_needs_no_copy_and_a_trained_one_has_a_frozen_one(build):
    fresh, trained = build(), build(trained=True)
    assert changes_nothing(fresh, "default") and not changes_nothing(trained, "default")
    assert reference(fresh).copies == {} and list(fresh.peft_config) == ["default"]
    grads = {name: p.requires_grad for name, p in trained.named_parameters()}
    assert reference(trained).copies == {"ref": "default"} and list(trained.peft_config) == ["default", "ref"]
    assert_same(tensors_of(trained, "ref"), tensors_of(trained))
    found = {name: p.requires_grad for name, p in trained.named_parameters()}
    assert {name: found[name] for name in grads} == grads
    assert not any(grad for name, grad in found.items() if ".ref." in name)


def test_frozen_adapter_below_the_one_that_trains_is_its_own_reference(build, token_ids):
    model = build(trained=True).eval()
    model.add_adapter("two", lora(r=2))
    model.set_adapter(["default", "two"])
    model.set_requires_grad("default", False)
    began, ref = logits(model, token_ids), reference(model)
    assert ref.copies == {"default": "default"} and list(model.peft_config) == ["default", "two"]
    assert torch.equal(ref(input_ids=token_ids).logits, began)


def test_reference_has_no_tensor_of_its_own_and_gives_no_gradient(build, token_ids):
    model = build(trained=True)
    size = sum(p.numel() for p in model.get_base_model().parameters())
    ref = reference(model)
    assert not list(ref.parameters()) and not list(ref.buffers())
    added = sum(tensor.numel() for tensor in tensors_of(model, "ref").values())
    assert sum(p.numel() for p in model.parameters()) <= size + added
    assert not ref(input_ids=token_ids).logits.requires_grad
    assert ref.config is model.config and ref.device == model.device


def test_gradient_through_a_forward_is_right_though_the_reference_ran_in_between(build, token_ids):
    model, other = build(trained=True), build(trained=True)
    ref = reference(model)
    for each in (model, other):
        loss = each(input_ids=token_ids, labels=token_ids).loss
        if each is model:
            ref(input_ids=token_ids)
        loss.backward()
    wanted = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(found, wanted)
    assert any(grad.abs().max() > 0 for grad in wanted.values())


def test_what_cannot_be_a_reference_is_refused(build, build_model):
    with pytest.raises(minilora.MiniLoraError, match="get_peft_model first"):
        reference(build_model("llama"))
    model = build(trained=True)
    model.merge_adapter()
    with pytest.raises(minilora.MiniLoraError, match="merged"):
        reference(model)


def test_copy_that_is_there_already_is_taken_if_it_is_what_the_model_is_now(build, build_model, token_ids, tmp_path):
    model = build(trained=True, lora_dropout=0.2)
    began = logits(model.eval(), token_ids)
    first = reference(model)
    assert reference(model).copies == first.copies == {"ref": "default"} and list(model.peft_config) == [
        "default",
        "ref",
    ]
    model.save_pretrained(tmp_path)
    again = minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True)
    again.load_adapter(tmp_path / "ref", "ref")
    assert torch.allclose(reference(again)(input_ids=token_ids).logits, began, atol=1e-6)


CHANGES = {
    "default trained on": lambda model: next(iter(tensors_in(model, "default"))).add_(1e-3),
    "ref was changed": lambda model: next(iter(tensors_in(model, "ref"))).add_(1e-3),
    "ref trains": lambda model: model.set_requires_grad("ref", True),
    "ref is active": lambda model: model.set_adapter(["default", "ref"], inference_mode=False),
    "ref has dropout": lambda model: (model.delete_adapter("ref"), model.add_adapter("ref", lora(lora_dropout=0.5))),
    "ref is another's": lambda model: (model.delete_adapter("ref"), model.add_adapter("ref", lora(r=2))),
}


def tensors_in(model, adapter):
    return (parameter.data for name, parameter in model.named_parameters() if f".{adapter}." in name)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_adapter_of_that_name_is_refused_with_the_way_out(build, token_ids, change):
    model = build(trained=True).eval()
    reference(model)
    change(model)
    held = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(minilora.MiniLoraError, match=r"another run began from it; delete_adapter\('ref'\) first"):
        reference(model)
    assert all(torch.equal(held[name], p) for name, p in model.named_parameters())
    model.delete_adapter("ref")
    model.set_adapter("default")
    assert torch.equal(reference(model)(input_ids=token_ids).logits, logits(model, token_ids))


# TRL


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "goes on"])
@every_trainer
def test_first_step_is_at_the_reference_and_no_second_model_is_made(build, fit, kind, trained, monkeypatch):
    models = []
    began = transformers.PreTrainedModel.__init__

    def counted(self, *args, **kwargs):
        models.append(weakref.ref(self))
        began(self, *args, **kwargs)

    model = build(trained)
    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", counted)
    start = tensors_of(model)
    trainer = fit(kind, model)
    gc.collect()
    assert not models
    assert isinstance(trainer.ref_model, Reference)
    assert_began_at_its_reference(kind, of_the_first_step(trainer))
    after = tensors_of(model)
    assert [key for key in start if not torch.equal(start[key], after[key])]
    assert trained == ("ref" in model.peft_config)
    if trained:
        assert_same(tensors_of(model, "ref"), start)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_reference_without_the_mixin(build, fit, kind):
    model = build(trained=True)
    trainer = fit(kind, model, mixin=False, given={"ref_model": reference(model)})
    assert_began_at_its_reference(kind, of_the_first_step(trainer))
    assert trainer.state.log_history[1]["loss"] != trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "goes on"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_losses_are_those_of_peft(build, build_model, fit, kind, trained, tmp_path):
    model = build(trained)
    model.save_pretrained(tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "start", is_trainable=True)
    ours = fit(kind, model).state.log_history
    wanted = fit(kind, theirs, "theirs", mixin=False).state.log_history
    for key in ("loss", "grad_norm", "rewards/chosen"):
        assert [e[key] for e in ours[:2]] == pytest.approx([e[key] for e in wanted[:2]], abs=2e-5), key


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "goes on"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_resumed_run_has_the_reference_of_the_first(build, fit, kind, trained, tmp_path):
    whole, again = build(trained), build(trained)
    first = fit(kind, whole, steps=4, lr_scheduler_type="constant")
    fit(kind, again, "again", resume=tmp_path / "run" / "checkpoint-2", steps=4, lr_scheduler_type="constant")
    assert_same(tensors_of(again), tensors_of(whole))
    assert first.state.global_step == 4


def test_resuming_with_another_reference_is_refused(build, fit, tmp_path):
    fit("dpo", build(trained=True), steps=1)
    with pytest.raises(minilora.MiniLoraError, match="began from an adapter that had learnt something"):
        fit("dpo", build(), "again", resume=tmp_path / "run" / "checkpoint-1")
    fit("dpo", build(), "fresh", steps=1)
    with pytest.raises(minilora.MiniLoraError, match="ref"):
        fit("dpo", build(trained=True), "more", resume=tmp_path / "fresh" / "checkpoint-1")


def test_precomputed_reference_is_the_same_and_knows_what_it_is_of(build, fit):
    entry = of_the_first_step(fit("dpo", build(trained=True), precompute_ref_log_probs=True))
    assert_began_at_its_reference("dpo", entry)
    one, two = reference(build(trained=True)), reference(build(trained=True, seed=1))
    hashed = trl.trainer.utils.hash_module
    assert hashed(one) != hashed(two)


@pytest.mark.parametrize("kind", ["sft", *PREFERENCE])
def test_peft_config_of_minilora(build_model, fit, kind, tmp_path):
    trainer = fit(kind, build_model("llama"), given={"peft_config": lora()})
    assert isinstance(trainer.model, minilora.PeftModel) and list(trainer.model.peft_config) == ["default"]
    trainer.save_model(str(tmp_path / "final"))
    peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "final")
    if kind != "sft":
        assert_began_at_its_reference(kind, of_the_first_step(trainer))


def test_what_a_trainer_cannot_be_given_is_refused_before_anything_changes(build, build_model, fit):
    theirs = peft.LoraConfig(r=4, target_modules=SOME)
    with pytest.raises(minilora.MiniLoraError, match=r"give minilora\.LoraConfig"):
        fit("dpo", build_model("llama"), given={"peft_config": theirs})
    with pytest.raises(minilora.MiniLoraError, match=r"model=minilora\.hf\.load_model"):
        fit("dpo", "some/model", given={"peft_config": lora()})
    with pytest.raises(minilora.MiniLoraError, match="leave peft_config out"):
        fit("dpo", build(), given={"peft_config": lora()})
    model = build(trained=True)
    with pytest.raises(minilora.MiniLoraError, match="sync_ref_model=True"):
        fit("dpo", model, sync_ref_model=True)
    assert list(model.peft_config) == ["default"]


def test_grpo_without_a_reference_makes_none(build, fit):
    trainer = fit("grpo", build(trained=True), beta=0.0)
    assert trainer.ref_model is None and list(adapters_of(trainer.model).configs) == ["default"]


def test_second_run_on_a_model_says_which_reference_is_meant(build, fit):
    model = build(trained=True)
    fit("dpo", model, train=False)
    first = fit("dpo", model, "again", steps=1)  # nothing has trained: the copy is taken
    assert_began_at_its_reference("dpo", of_the_first_step(first))
    with pytest.raises(minilora.MiniLoraError, match="ref_model= of that run"):
        fit("dpo", model, "more")
    kept = fit("dpo", model, "kept", steps=1, given={"ref_model": first.ref_model})
    assert of_the_first_step(kept)["loss"] != pytest.approx(math.log(2), abs=1e-6)
    model.delete_adapter("ref")
    assert_began_at_its_reference("dpo", of_the_first_step(fit("dpo", model, "more", steps=1)))


@pytest.mark.parametrize("kind", ["sft", *PREFERENCE])
def test_plain_trl_refuses_our_config_in_the_words_of_the_docs(build_model, fit, kind):
    """docs/guides/fine-tune.md quotes them, and says what to pass."""
    said = "`peft_config` must be a `peft.PeftConfig` instance (e.g. `peft.LoraConfig`), got LoraConfig."
    with pytest.raises(TypeError) as caught:
        fit(kind, build_model("llama"), mixin=False, given={"peft_config": lora()})
    assert str(caught.value) == said
    guide = pathlib.Path(__file__).parents[2] / "docs/guides/fine-tune.md"
    assert said in " ".join(guide.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_losses_without_the_mixin_and_in_mixed_precision(build, fit, kind, bf16):
    """accelerate binds a ``forward`` around TRL's; both must find the model without its head."""
    losses = []
    for mixin in (True, False):
        model = build(trained=True)
        given = {} if mixin or kind == "sft" else {"ref_model": reference(model)}
        trainer = fit(kind, model, f"mixin {mixin}", mixin=mixin, given=given, bf16=bf16)
        losses.append([entry["loss"] for entry in trainer.state.log_history[:2]])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
    whole = fit(kind, build(trained=True), "whole").state.log_history
    assert losses[0] == pytest.approx([entry["loss"] for entry in whole[:2]], abs=0.05 * bf16)


def test_forward_that_others_bind_stays_bound_to_the_model(build, token_ids):
    model, seen = build(), []
    own = model.forward.__func__

    def forward(self, *args, **kwargs):
        seen.append(self)
        return own(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    model(input_ids=token_ids)
    assert seen == [model]


def test_plain_sft_takes_a_model_that_is_adapted_already(build, fit, tmp_path):
    model = build()
    start = tensors_of(model)
    trainer = fit("sft", model, mixin=False)
    after = tensors_of(model)
    assert [key for key in start if not torch.equal(start[key], after[key])]
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
