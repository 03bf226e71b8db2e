"""A small mixture of experts from nothing to a merged adapter: does each step do what it says, and how far does each expert move?

    python benchmarks/experts_run.py [--seconds 60] [--steps 80] [--out FILE] [--figure docs]

A Qwen3-MoE of 1.2 million weights (two layers, 32 experts, two for a token, a token a byte) learns Python's prose, is packed to NF4 with
double quantization, and learns Python's source through LoRA on every linear layer, experts included. Then the adapter is loaded on
the dense model by minilora and by PEFT, and merged. Losses are in nats per byte of source that was held out. Writes
``results/experts_run.csv`` and ``results/experts_run_experts.csv``: tokens of each expert, and the norm of its update.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, stamp, write_csv
from torch import Tensor, nn

import minilora
from minilora import LoraConfig, QuantConfig
from minilora.lab.byte_model import code, docs
from minilora.report.inspect import adapters_in

LENGTH, BATCH = 128, 8
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "moe_intermediate_size": 96, "num_experts": 32, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LORA = LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")


def mixture(**sizes: Any) -> Any:
    """A fresh model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, "initializer_range": 0.08, **sizes}))


def pieces(text: bytes, seed: int) -> Iterator[Tensor]:
    """Batches ``[BATCH, LENGTH]`` of pieces from anywhere in the text, without end."""
    tokens, draw = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - LENGTH + 1, (BATCH, 1), generator=draw)
        yield tokens[starts + torch.arange(LENGTH)]


def train(model: Any, text: bytes, lr: float, steps: int = 0, seconds: float = 0.0) -> list[float]:
    """AdamW without decay, so that what gets no gradient stays; the losses."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    begun, losses = time.monotonic(), []
    for batch in pieces(text, 1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) >= steps if steps else time.monotonic() - begun > seconds:
            return losses
    raise AssertionError("pieces never end")


@torch.no_grad()
def loss_of(model: Any, text: bytes) -> float:
    """Nats per byte of the first pieces of a text."""
    tokens = torch.frombuffer(bytearray(text[: 64 * LENGTH]), dtype=torch.uint8).long().view(-1, LENGTH)
    return float(model.eval()(input_ids=tokens, labels=tokens, use_cache=False).loss)


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """How many tokens each router sends to each expert meanwhile, by the path of its mixture."""
    counts: dict[str, Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if path.endswith(".mlp.gate"):
            name = path.removesuffix(".gate").rpartition("model.")[2]

            def note(layer: Any, args: Any, out: Any, name: str = name) -> None:
                found = torch.bincount(out[2].flatten(), minlength=SIZES["num_experts"])
                counts[name] = counts.get(name, torch.zeros_like(found)) + found

            handles.append(module.register_forward_hook(note))
    yield counts
    for handle in handles:
        handle.remove()


def experts_moved(packed: nn.Module, counts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Tokens and the norms of the updates of both projections, a row an expert.

    Raises:
        RuntimeError: an expert that saw tokens has not moved, or one that saw none has.
    """
    rows = []
    norms: dict[str, dict[str, Tensor]] = {}
    for path, layer in adapters_in(packed).items():
        if layer.on == "experts":
            mixture_path, _, projection = path.rpartition("model.")[2].partition(".experts.")
            norms.setdefault(mixture_path, {})[projection] = layer.delta_weight().detach().flatten(1).norm(dim=1)
    for name, tokens in counts.items():
        for expert, seen in enumerate(tokens.tolist()):
            moved = {key: float(values[expert]) for key, values in norms[name].items()}
            if any((value > 0) != (seen > 0) for value in moved.values()):
                raise RuntimeError(f"{name}, expert {expert}: {seen} tokens and updates of {moved}")
            rows.append(
                {
                    "mixture": name,
                    "expert": expert,
                    "tokens": seen,
                    **{key: f"{value:.4g}" for key, value in moved.items()},
                }
            )
    return rows


def loaded(base: Any, folder: str, library: Any) -> Any:
    """A dense copy of the base with the saved adapter on it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def job(base: Any, steps: int, lr: float = 3e-3) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """From the dense base to a merged adapter: rows of losses, and rows of experts."""
    import peft

    learnt, held_out = code(), code(held_out=True)
    base = base.eval().requires_grad_(False)
    packed = minilora.quantize_model(copy.deepcopy(base), QuantConfig("nf4", double_quant=True))
    rows = [
        {"what": "dense, before", "loss": loss_of(base, held_out)},
        {"what": "packed, before", "loss": loss_of(packed, held_out)},
    ]
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = minilora.get_peft_model(packed, LORA)
    with counted(model) as counts:
        losses = train(model, learnt, lr, steps)
    rows.append({"what": "packed, with its adapter", "loss": loss_of(model, held_out)})
    if rows[-1]["loss"] >= rows[1]["loss"]:
        raise RuntimeError(f"nothing was learnt: {rows}")
    experts = experts_moved(packed, counts)
    with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
        model.save_pretrained(folder)
        ours, theirs = loaded(base, folder, minilora), loaded(base, folder, peft)
    batch = next(pieces(held_out, 2))
    with torch.no_grad():
        wanted, found = theirs(batch).logits, {"dense, loaded by minilora": ours(batch).logits}
        rows.append({"what": "dense, loaded by minilora", "loss": loss_of(ours, held_out)})
        rows.append({"what": "dense, loaded by PEFT", "loss": loss_of(theirs, held_out)})
        merged = ours.merge_and_unload()
        found["dense, merged"] = merged(batch).logits
        rows.append({"what": "dense, merged", "loss": loss_of(merged, held_out)})
    for name, logits in found.items():
        apart = ((logits - wanted).norm() / wanted.norm()).item()
        if apart > 1e-4:
            raise RuntimeError(f"{name}: the logits are {apart:.1e} from PEFT's")
        next(row for row in rows if row["what"] == name)["logits differ from PEFT's by"] = f"{apart:.1e}"
    for row in rows:
        row["loss"] = f"{row['loss']:.5f}"
    rows[2]["steps"], rows[2]["training loss, first"], rows[2]["last"] = steps, f"{losses[0]:.4f}", f"{losses[-1]:.4f}"
    return rows, experts


def figure(rows: list[dict[str, Any]]) -> Any:
    """How far each expert moved over the tokens that it saw, a point an expert and projection."""
    from minilora.report.canvas import add_line, canvas, finish
    from minilora.report.svg import SERIES

    with canvas(6.4, 3.2) as (drawn, axes):
        for place, (key, name) in enumerate((("gate_up_proj", "gate and up"), ("down_proj", "down"))):
            points = sorted((row["tokens"] + 1.0, float(row[key])) for row in rows)
            add_line(axes, name, points, SERIES[place], linestyle="none")
        finish(drawn, axes, "tokens of the expert during the fine-tuning, plus one", "norm of the update of an expert")
        most = max(row["tokens"] for row in rows) + 1
        ticks = [10**power for power in range(len(str(most)))]
        axes.set_xscale("log")
        axes.set_xlim(0.8, 1.2 * most)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    return drawn


def write_figure(rows: list[dict[str, Any]], folder: Path) -> None:
    """``experts-moved.svg`` for light pages and ``experts-moved-dark.svg`` for dark ones."""
    from minilora.report.svg import svg_file

    words = "The norm of each expert's update over the tokens it saw: 0 where it saw none, and rising with the tokens elsewhere"
    for dark in (False, True):
        place = folder / f"experts-moved{'-dark' * dark}.svg"
        place.write_text(svg_file(figure(rows), words, dark), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the base learns")
    parser.add_argument("--steps", type=int, default=80, help="of the fine-tuning")
    parser.add_argument("--out", type=Path, default=RESULTS / "experts_run.csv")
    parser.add_argument("--figure", type=Path, help="folder for a figure of the experts")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    base = mixture()
    losses = train(base, docs(), 4e-3, seconds=options.seconds)
    print(
        f"{base.num_parameters():,} weights, {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True
    )
    rows, experts = job(base, options.steps)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    seen = sum(row["tokens"] > 0 for row in experts)
    print(f"{seen} of {len(experts)} experts saw tokens, and these moved; no other did")
    marks = stamp("peft", "transformers")
    write_csv(options.out, [{**row, "base steps": len(losses)} for row in rows], marks)
    write_csv(options.out.with_name(f"{options.out.stem}_experts.csv"), experts, marks)
    if options.figure is not None:
        write_figure(experts, options.figure)


if __name__ == "__main__":
    main()
