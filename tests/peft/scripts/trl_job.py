"""A few steps of one of TRL's trainers, as it is written for PEFT: ``python trl_job.py sft|dpo|dpo-adapted|grpo FOLDER``."""

import json
import os
import sys
import warnings

import torch

warnings.simplefilter("ignore")
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

KIND, FOLDER = sys.argv[1:]
letters = {each: i for i, each in enumerate(["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
split = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
split.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
)
model.name_or_path = "tiny"
config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
common = {
    "output_dir": FOLDER,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "seed": 0,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}
questions = [f"what is {i}? " for i in range(12)]
if KIND == "sft":
    rows = [{"prompt": question, "completion": f"it is {i + 1}"} for i, question in enumerate(questions)]
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config,
    )
elif KIND.startswith("dpo"):
    rows = [{"prompt": q, "chosen": f"it is {i + 1}", "rejected": f"no {i}"} for i, q in enumerate(questions)]
    torch.manual_seed(5)
    adapted = (
        {"model": get_peft_model(model, config)} if KIND == "dpo-adapted" else {"model": model, "peft_config": config}
    )
    torch.manual_seed(7)
    trainer = trl.DPOTrainer(
        **adapted, args=trl.DPOConfig(**common), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
else:
    settings = common | {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.1,
    }
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(each))) for each in completions],
        args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": question} for question in questions]),
        processing_class=tokenizer,
        peft_config=config,
    )
trainer.train()
trainer.save_model(FOLDER + "/adapter")
print(
    json.dumps(
        {
            "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
            "gradients": [each["grad_norm"] for each in trainer.state.log_history if "grad_norm" in each],
            "files": sorted(set(os.listdir(FOLDER + "/adapter")) - {"minilora.json"}),
        }
    )
)
