"""The job that engineers run, from start to saved adapter: ``minilora train`` beside TRL's SFTTrainer with PEFT and bitsandbytes.

    python benchmarks/job.py                   # both sets of data, 3 rounds, about an hour on two cores; writes benchmarks/results/job.csv
    python benchmarks/job.py --device cuda     # the same on a GPU, in minutes

Same base (SmolLM2-135M-Instruct), examples, epochs, examples a step, rank, learning rate and schedule, NF4 with double quantization; each
run is a process of its own, and the two take turns. The rate of each step is minilora's in both: transformers' cosine spends the first step
of a warm-up at 0, which shows in a run of a few steps. TRL learns from the completion only, as minilora does, and packs where that is said
(`--trl-packing`): then its rows a step hold as many examples on average. Wall and processor time and the peak of memory are those of the
whole process, imports and loading included. The loss is the mean over the tokens of held-out answers, computed by one and the same code
from each saved adapter, on the dense base.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "job.csv"
SIDES = ("minilora", "TRL + PEFT + bitsandbytes")
LONGEST = 512
R, ALPHA, RATE, WARMUP, BATCH = 8, 16, 1e-3, 0.1, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- data


def demo_lines() -> list[dict]:
    """The keeper's conversations: 68 to 90 tokens each."""
    from minilora.demo import DATA

    return [json.loads(line) for line in DATA.read_text().splitlines()]


def long_tailed_lines(count: int = 80, seed: int = 0) -> list[dict]:
    """Answers of very unlike lengths, joined from the keeper's: most are short, a few fill the context (a log-normal length)."""
    draw, lines = random.Random(seed), demo_lines()
    answers = [line["messages"][1]["content"] for line in lines]
    found = []
    for number in range(count):
        words = min(340, max(12, int(draw.lognormvariate(3.6, 1.0))))
        text = ""
        while len(text.split()) < words:
            text = f"{text} {draw.choice(answers)}".strip()
        user = lines[number % len(lines)]["messages"][0]
        found.append({"messages": [user, {"role": "assistant", "content": " ".join(text.split()[:words])}]})
    return found


def write_data(name: str, folder: Path) -> tuple[Path, Path]:
    """Files of the lines to learn from and of those held out: every tenth."""
    lines = demo_lines() if name == "demo" else long_tailed_lines()
    learn, held = folder / f"{name}.jsonl", folder / f"{name}-held.jsonl"
    learn.write_text("".join(json.dumps(line) + "\n" for i, line in enumerate(lines) if i % 10))
    held.write_text("".join(json.dumps(line) + "\n" for i, line in enumerate(lines) if not i % 10))
    return learn, held


# ---- the two sides, each in a process of its own


def command_of(
    side: str, base: str, data: Path, out: Path, steps: int, seed: int, options: argparse.Namespace
) -> list[str]:
    if side == SIDES[0]:
        words = {"model": base, "data": data, "out": out, "steps": steps, "batch-size": BATCH, "lr": RATE, "seed": seed}
        words |= {
            "r": R,
            "lora-alpha": ALPHA,
            "eval-share": 0,
            "max-length": LONGEST,
            "device": options.device,
            "warmup": WARMUP,
        }
        flags = [text for name, value in words.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "minilora", "train", *flags]
    packs = str(int(options.trl_packing))
    return [
        sys.executable,
        __file__,
        "--serve-trl",
        base,
        str(data),
        str(out),
        str(steps),
        str(seed),
        options.device,
        packs,
    ]


def serve_trl(base: str, data: str, out: str, steps: str, seed: str, device: str, packs: str) -> None:
    """TRL's way, as its documentation has it."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from minilora.training.schedule import learning_rate
    from minilora.training.settings import TrainConfig

    cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=packed, dtype=dtype, device_map=device, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns=["messages"]
    )
    lengths = [len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)) for row in rows]
    packed_rows = max(1, round(BATCH * sum(lengths) / len(lengths) / LONGEST))
    arguments = SFTConfig(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=packed_rows if int(packs) else BATCH,
        learning_rate=RATE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=int(seed),
        max_length=LONGEST,
        packing=bool(int(packs)),
        completion_only_loss=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=cuda,
    )
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    schedule = TrainConfig(steps=int(steps), lr=RATE, warmup=WARMUP)

    class SameSchedule(SFTTrainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            def share(step: int) -> float:
                return learning_rate(schedule, step) / RATE

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            return self.lr_scheduler

    trainer = SameSchedule(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    trainer.train()
    trainer.model.save_pretrained(out)


def measured(command: list[str], threads: int) -> dict[str, float]:
    """Run a command to its end: wall and processor seconds, and the peak of its memory in MB."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(
                f"{' '.join(command[:4])} ... ended with {process.returncode}:\n{said.read().decode()[-2000:]}"
            )
    return {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss * 1024 / 1e6}


# ---- what came of it


def held_out_loss(base: str, adapter: Path, held: Path) -> float:
    """Mean loss in nats of the held-out answers' tokens, with a saved adapter on the dense base."""
    from minilora.data.encoding import encode_all
    from minilora.data.records import read_jsonl
    from minilora.hf.load import load_model, load_tokenizer
    from minilora.store.load import load_adapter
    from minilora.training.losses import evaluate

    model, tokenizer = load_model(base), load_tokenizer(base)
    load_adapter(model, adapter, allow_other_base=True)  # the base that both have packed in their own way
    return evaluate(model, encode_all(read_jsonl(held), tokenizer, LONGEST), BATCH, tokenizer.pad_token_id)


def compare(name: str, options: argparse.Namespace, folder: Path, base: str) -> list[dict]:
    learn, held = write_data(name, folder)
    count = len(learn.read_text().splitlines())
    steps = options.steps or options.epochs * -(-count // BATCH)
    rows = []
    for round_ in range(options.repeats):
        for side in SIDES if round_ % 2 == 0 else SIDES[::-1]:
            out = folder / f"{name}-{round_}-{SIDES.index(side)}"
            found = measured(command_of(side, base, learn, out, steps, round_, options), options.threads)
            found["held_out_loss"] = held_out_loss(base, out, held)
            rows.append({"set": name, "side": side, "round": round_, "steps": steps, **found})
            print(
                f"{name}, round {round_ + 1}/{options.repeats}, {side}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in found.items()),
                flush=True,
            )
    return rows


def table(rows: list[dict]) -> list[dict]:
    """A row for each set and side: medians, with the smallest and largest value of each figure."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        for side in SIDES:
            own = [row for row in rows if row["set"] == name and row["side"] == side]
            line = {"set": name, "side": side, "steps": own[0]["steps"], "rounds": len(own)}
            for figure in ("wall_s", "cpu_s", "peak_mb", "held_out_loss"):
                values = [row[figure] for row in own]
                line |= {figure: f"{median(values):.4g}", f"{figure}_range": f"{min(values):.4g} to {max(values):.4g}"}
            found.append(line)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--serve-trl"]:
        return serve_trl(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=("demo", "long-tailed"), default=["demo", "long-tailed"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trl-packing", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from minilora.hf.load import resolve

    base = resolve("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in options.sets for row in compare(name, options, Path(folder), base)]
    lines = table(rows)
    machine = f"{platform.machine()}, {options.device}, {options.threads} threads"
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "machine"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(line | {"machine": machine} for line in lines)
    for name in options.sets:
        ours, theirs = (next(line for line in lines if (line["set"], line["side"]) == (name, side)) for side in SIDES)
        ratios = {key: float(ours[key]) / float(theirs[key]) for key in ("wall_s", "cpu_s", "peak_mb")}
        print(f"{name}: minilora / TRL: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))


if __name__ == "__main__":
    main()
