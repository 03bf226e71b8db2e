"""The script that every tutorial on QLoRA has, as it is written for PEFT: four or eight bits, Trainer, resume, reload, merge.

``python qlora.py BITS FOLDER`` runs it with PEFT, ``python -m minilora.peft qlora.py BITS FOLDER`` with minilora.
"""

import json
import sys

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

# On a processor that multiplies bf16 it packs layers once more, which it cannot where rows are no whole number of blocks.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
BITS, FOLDER = int(sys.argv[1]), sys.argv[2]
PACKED = (
    BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    if BITS == 4
    else BitsAndBytesConfig(load_in_8bit=True)
)


def base():
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER + "/base", quantization_config=PACKED, device_map={"": "cpu"}, dtype=torch.float32
    )
    return prepare_model_for_kbit_training(model)


def adapted():
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], bias="none", task_type="CAUSAL_LM")
    return get_peft_model(base(), config)


def trainer(model):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 96, (13,), generator=generator) for _ in range(16)]
    arguments = TrainingArguments(
        FOLDER + "/run",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=2e-3,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        optim="adamw_torch",
        seed=0,
    )
    return Trainer(model=model, train_dataset=[{"input_ids": each, "labels": each} for each in ids], args=arguments)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(11)[None]).logits


model = adapted()
loss = trainer(model).train().training_loss
again = adapted()
trainer(again).train(resume_from_checkpoint=FOLDER + "/run/checkpoint-2")
trained, resumed = ({k: v for k, v in m.state_dict().items() if "lora_" in k} for m in (model, again))
model.save_pretrained(FOLDER + "/adapter")
wanted = logits(model)
reloaded = logits(PeftModel.from_pretrained(base(), FOLDER + "/adapter"))
merged = model.merge_and_unload()
print(
    json.dumps(
        {
            "loss": loss,
            "names": sorted(trained),
            "resumed": max(float((trained[name] - resumed[name]).abs().max()) for name in trained),
            "reloaded": float((reloaded - wanted).abs().max()),
            "merged": float((logits(merged) - wanted).abs().max()),
            "class": type(merged).__name__,
        }
    )
)
