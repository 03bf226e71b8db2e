"""QLoRA in one file: a language model in 4 bits, frozen, and two thin matrices beside each of its weights that learn.

    python lessons/nano.py MODEL DATA OUT        # a folder of a transformers model, a file of conversations, a new folder

Read it from the top; each part needs only what stands above it. It is plain, and it is complete: the adapter that it saves opens in PEFT,
vLLM and minilora. What a tool for daily use adds (other formats, checks, speed, resuming) is in the package minilora beside it.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

# ---- 1. A weight in 4 bits: NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3)

# Sixteen levels for numbers between -1 and 1, close together near 0, where most weights of a trained model lie.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], 1)  # [256, 2]: the two levels of every byte
BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share a scale of their own


def levels_of_scales():
    """The 256 levels that a scale in 8 bits can have (Dettmers 2015, arXiv 1511.04561): 1 to 64 of them for each power of ten from 1e-6."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        levels += middles + [-middle for middle in middles]
    return torch.tensor(sorted(levels))


SCALES = levels_of_scales()


def nearest(values, levels):
    """The number of the level that is nearest to each value: how many midpoints between levels lie below it."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


def quantize(weight):
    """A weight [out, in] as bytes of two codes each, and its scales: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight, not 32."""
    blocks = weight.detach().float().reshape(-1, BLOCK)  # fails where the weights are no whole number of blocks
    absmax = blocks.abs().amax(1)  # the scale of a block is its largest magnitude, so that all of it lies in [-1, 1]
    codes = nearest(blocks * absmax.clamp(min=1e-38).reciprocal()[:, None], NF4).flatten()
    packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)  # the first of two codes in the high half of the byte
    return {"packed": packed, "shape": weight.shape, **quantize_scales(absmax)}


def quantize_scales(absmax):
    """Double quantization: a scale for 64 weights would cost half a bit a weight, so the scales themselves are kept in 8 bits."""
    offset = absmax.mean()  # scales are never negative; without their mean they use both signs of the levels
    rest = absmax - offset
    largest = F.pad(rest, (0, -len(rest) % GROUP)).view(-1, GROUP).abs().amax(1)
    scaled = (rest * largest.reciprocal().repeat_interleave(GROUP)[: len(rest)]).nan_to_num(
        -1.0
    )  # of equal scales nothing is left
    # The library bitsandbytes rounds to 65,536 even steps first, and takes the level nearest to the step. To write its bytes we do, too.
    steps = ((scaled.clamp(-1, 1) + 1) * 32767.5 + 0.5).long()
    codes = nearest(torch.arange(65536, dtype=torch.float64) * 2 / 65535 - 1, SCALES.double())[steps]
    return {"scales": codes.to(torch.uint8), "largest": largest, "offset": offset}


def dequantize(stored):
    """The weight [out, in] in 32 bits again, each number the nearest level times the scale of its block."""
    levels = F.embedding(stored["packed"].int(), PAIRS)
    scales = SCALES[stored["scales"].int()] * stored["largest"].repeat_interleave(GROUP)[: len(stored["scales"])]
    return (levels.view(-1, BLOCK) * (scales + stored["offset"])[:, None]).view(stored["shape"])


# ---- 2. A linear layer on such a weight
class PackedProduct(torch.autograd.Function):
    """y = x W^T. The weight is frozen, so the way back needs W and nothing else: no input is kept, and W only as bytes."""

    @staticmethod
    def forward(ctx, x, stored):
        ctx.stored = stored
        return x @ dequantize(stored).T

    @staticmethod
    def backward(ctx, grad):  # dL/dx = dL/dy W, with W decoded once more: a little work instead of a lot of memory
        return grad @ dequantize(ctx.stored), None


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is in 4 bits."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.stored = quantize(linear.weight)

    def forward(self, x):
        y = PackedProduct.apply(x, self.stored)
        return y if self.bias is None else y + self.bias


# ---- 3. LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): y = W x + (lora_alpha / r) B A x
class LoRALinear(nn.Module):
    """A frozen layer, and beside it a product of two thin matrices that learns."""

    def __init__(self, base_layer, r, lora_alpha):
        super().__init__()
        self.base_layer, self.scaling = base_layer, lora_alpha / r
        # B = 0: before the first step the layer computes what it did. A is random: with A = 0 too, neither would ever move.
        self.lora_A = nn.Parameter((torch.rand(r, base_layer.in_features) * 2 - 1) / math.sqrt(base_layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))

    def forward(self, x):
        return self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def adapt(model, r, lora_alpha):
    """Freeze the model, pack every linear layer but the head (often the embedding, too), and put an adapter beside each, by its path."""
    model.requires_grad_(False)
    adapters = {}
    for path, module in list(model.named_modules()):  # a list, because the walk changes what it walks through
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                adapter = LoRALinear(PackedLinear(child), r, lora_alpha)
                setattr(module, name, adapter)
                adapters[f"{path}.{name}"] = adapter
    return adapters


# ---- 4. What is learnt: the answers of a conversation, given all that stands before them
def encode(messages, tokenizer, max_length):
    """Token ids, and labels: the same ids where an answer stands, and -100, which the loss leaves out, elsewhere."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
            through = tokenizer.apply_chat_template(messages[: at + 1], tokenize=False)
            spans.append((len(before), len(through.rstrip())))  # the answer and its end token, no line break after it
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = tokens["input_ids"][:max_length], tokens["offset_mapping"][:max_length]
    labels = [
        token if any(start <= left and right <= end for start, end in spans) else -100
        for token, (left, right) in zip(ids, places, strict=True)
    ]
    return ids, labels


def batch_of(examples, pad_id):
    """Examples of different lengths as one rectangle; what fills it up is not looked at, and not learnt."""

    def padded(rows, fill):
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    ids, labels = zip(*examples, strict=True)
    mask = padded([[1] * len(row) for row in ids], 0)
    return {"input_ids": padded(ids, pad_id), "attention_mask": mask}, padded(labels, -100)


def loss_of(model, batch, labels):
    """Cross-entropy in nats a token: what is at place t predicts the token at t + 1, so the labels move by one."""
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


# ---- 5. The loop
def batches(examples, size):
    """Batches without end, every example once an epoch, each epoch in its own order."""
    epoch, waiting = 0, []
    while True:
        while len(waiting) < size:
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(epoch))
            epoch, waiting = epoch + 1, waiting + order.tolist()
        yield [examples[at] for at in waiting[:size]]
        waiting = waiting[size:]


def rate_at(step, steps, lr):
    """The learning rate rises over the first tenth of the steps, and falls to 0 along half a cosine."""
    rise = max(1, round(0.1 * steps))
    fallen = (step - rise) / max(1, steps - rise)
    return lr * (step + 1) / rise if step < rise else lr * 0.5 * (1 + math.cos(math.pi * fallen))


def train(model, examples, pad_id, steps, lr, batch_size=4):
    """Train what asks for a gradient, which is A and B alone. Returns the loss of every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, weight_decay=0.0), []
    model.train()
    for step, some in zip(range(steps), batches(examples, batch_size), strict=False):
        loss = loss_of(model, *batch_of(some, pad_id))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)  # one strange batch must not throw away what was learnt
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, lr)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}", flush=True)
    return losses


# ---- 6. Keep it: the two files of PEFT's layout
def save(adapters, folder, r, lora_alpha):
    """A few megabytes: the adapter alone, under the names that other programs look for."""
    tensors = {f"base_model.model.{path}.lora_A.weight": adapter.lora_A.data for path, adapter in adapters.items()}
    tensors |= {f"base_model.model.{path}.lora_B.weight": adapter.lora_B.data for path, adapter in adapters.items()}
    Path(folder).mkdir(parents=True)
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    names = sorted({path.rpartition(".")[2] for path in adapters})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": lora_alpha, "target_modules": names}
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=2))


def answer(model, tokenizer, question):
    """What the model says to a question, the likeliest token each time."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.eval().generate(**ids, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main(model_folder, data, out, steps=48, lr=1e-3, r=8, lora_alpha=16):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(out).exists():
        sys.exit(f"{out} is there already; wanted a new folder")
    torch.manual_seed(0)
    began, question = time.perf_counter(), "What is the capital of France?"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    records = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    examples = [encode(record["messages"], tokenizer, max_length=128) for record in records]
    adapters = adapt(model, r, lora_alpha)
    print(f"{question}\nbefore: {answer(model, tokenizer, question)}")
    train(
        model, [one for one in examples if max(one[1][1:]) >= 0], tokenizer.pad_token_id or 0, steps, lr
    )  # with an answer
    print(f"{question}\nafter: {answer(model, tokenizer, question)}")
    save(adapters, out, r, lora_alpha)
    print(f"saved in {out} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit("usage: python lessons/nano.py MODEL DATA OUT")
