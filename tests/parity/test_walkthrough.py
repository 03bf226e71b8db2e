"""The classic walkthrough of LoRA, run twice: with ``from peft import ...`` and with that one line naming minilora instead."""

import contextlib
import dataclasses
import io
import re

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import minilora

pytestmark = [
    # PEFT reads the orientation of a layer from its config and says so when it has to correct the config.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]

IMPORT = "from peft import LoraConfig, get_peft_model"
SCRIPT = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
{IMPORT}

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base)
tokenizer = AutoTokenizer.from_pretrained(base)

config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["c_attn", "c_proj"],
    lora_dropout=0.0,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

dataset = [tokenizer(text, truncation=True, max_length=32) for text in texts]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=4,
        max_steps=5,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
)
trainer.train()

model.eval()
prompt = tokenizer("the cat", return_tensors="pt")
generated = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
logits = model(**prompt).logits.detach()
model.save_pretrained(output)
"""
TEXTS = [
    "the cat sat on the mat",
    "the dog ran to the cat",
    "a bird sang on the tree and the cat ran",
    "the mat sat on a dog",
    "a cat and a dog sang to the bird",
    "the tree ran",
    "a bird sat",
    "the dog sat on the mat and a bird sang",
]


def save_base(folder):
    """A random GPT-2 and a tokenizer of whole words, on disk as a downloaded model would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=len(words), n_positions=32, initializer_range=0.2,
                        bos_token_id=1, eos_token_id=1)  # fmt: skip
    torch.manual_seed(9)
    GPT2LMHeadModel(config).save_pretrained(folder)


@dataclasses.dataclass
class Run:
    """What one run of the script printed, computed and wrote."""

    folder: object
    line: str
    losses: list
    generated: torch.Tensor
    logits: torch.Tensor
    prompt: dict
    model: torch.nn.Module

    def tensors(self):
        return load_file(self.folder / "adapter_model.safetensors")


def run(script, base, output):
    names = {"base": str(base), "output": str(output), "texts": TEXTS}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, "walkthrough", "exec"), names)
    line = re.search(r"^trainable params: .*$", printed.getvalue(), re.MULTILINE).group()
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    return Run(output, line, losses, names["generated"], names["logits"], dict(names["prompt"]), names["model"])


def script_for(library):
    return SCRIPT.replace(IMPORT, IMPORT.replace("peft import", f"{library} import"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """``(minilora's, PEFT's)`` run of the script. No dropout: the fused layer draws its masks otherwise than PEFT does."""
    return tuple(run(script_for(library), base, tmp_path_factory.mktemp(library)) for library in ("minilora", "peft"))


def test_the_two_scripts_differ_in_one_import_line():
    pairs = zip(script_for("minilora").splitlines(), script_for("peft").splitlines(), strict=True)
    different = [pair for pair in pairs if pair[0] != pair[1]]
    assert different == [("from minilora import LoraConfig, get_peft_model", IMPORT)]


def test_printed_parameter_lines_are_equal(runs):
    ours, theirs = runs
    assert ours.line == theirs.line


def test_training_losses_are_equal_and_fall(runs):
    ours, theirs = runs
    assert ours.losses == pytest.approx(theirs.losses, rel=0, abs=1e-5)
    assert len(ours.losses) == 5 and ours.losses[-1] < ours.losses[0]


def test_generated_ids_are_equal(runs):
    ours, theirs = runs
    assert torch.equal(ours.generated, theirs.generated)
    assert ours.generated.shape[1] > ours.prompt["input_ids"].shape[1]


def test_generated_ids_are_not_those_of_the_base(runs, base):
    ours, _ = runs
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = model.generate(**ours.prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert not torch.equal(plain, ours.generated)


def test_logits_are_equal(runs):
    ours, theirs = runs
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)


def test_saved_tensors_are_equal(runs):
    ours, theirs = (one.tensors() for one in runs)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 3 * 2
    for key in theirs:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_saved_tensors_were_trained(runs):
    ours, _ = runs
    assert all(tensor.abs().max() > 1e-3 for tensor in ours.tensors().values())


def test_file_of_minilora_opens_in_peft_with_equal_logits(runs, base):
    ours, _ = runs
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ours.folder)
    torch.testing.assert_close(loaded(**ours.prompt).logits.detach(), ours.logits, rtol=0, atol=1e-6)


def test_file_of_peft_opens_in_minilora_with_equal_logits(runs, base):
    _, theirs = runs
    loaded = minilora.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), theirs.folder)
    torch.testing.assert_close(loaded(**theirs.prompt).logits.detach(), theirs.logits, rtol=0, atol=1e-6)


def test_file_of_each_opens_in_itself_with_equal_logits(runs, base):
    for library, one in zip((minilora, peft), runs, strict=True):
        loaded = library.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one.folder)
        torch.testing.assert_close(loaded(**one.prompt).logits.detach(), one.logits, rtol=0, atol=1e-6)


def test_model_is_still_the_class_that_it_was_and_has_adapters(runs):
    ours, _ = runs
    assert isinstance(ours.model, GPT2LMHeadModel) and isinstance(ours.model, minilora.PeftModel)


def test_merged_models_generate_equal_ids(runs, base):
    generated = []
    for library, one in zip((minilora, peft), runs, strict=True):
        loaded = library.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one.folder)
        merged = loaded.merge_and_unload()
        generated.append(merged.generate(**one.prompt, max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*generated) and torch.equal(generated[0], runs[0].generated)
