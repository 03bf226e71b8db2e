# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 3 · Where adapters go
#
# **The question.** A model has hundreds of parts. Which of them get an adapter, which stay as they are, and what does each choice cost?
#
# In PyTorch a model is a tree of *modules*. A module holds other modules, and at the ends of the tree are those that hold weights. A *path*
# such as `model.layers.0.self_attn.q_proj` leads from the root to one of them. A *linear layer* multiplies by a weight with `out` rows and
# `in` columns. An *adapter* is the pair of matrices $A$ and $B$ beside such a layer (lesson 2), and it trains
#
# $$r \, (\text{in} + \text{out}) \quad \text{numbers, beside} \quad \text{in} \cdot \text{out} \quad \text{that are frozen.}$$
#
# Two models are looked at, GPT-2 and SmolLM2-135M. Only their shapes matter here, so they are made with random weights, and with one
# *block*: the part that both repeat, 12 times and 30 times, each time with other weights.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minilora import Adapter, LoraConfig, QuantConfig, QuantLinear, inject, quantize_model, unload
from minilora.errors import TargetError

torch.manual_seed(0)
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "tie_word_embeddings": True}  # SmolLM2 is built as a Llama
gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1))
smollm2 = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SHAPE))

# %% [markdown]
# GPT-2 stays in 32 bits. The linear layers of SmolLM2 are *packed*: each weight is kept in about four bits (lesson 5). Then both get an
# adapter of rank 8 on every linear layer but the last. minilora writes the adapter into the place of the layer, and keeps the layer inside
# it.

# %%
quantize_model(smollm2, QuantConfig("nf4", double_quant=True))
for model in (gpt2, smollm2):
    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
print(smollm2.model.layers[0].self_attn.q_proj)

# %% [markdown]
# ## The tree
#
# A walk over the tree finds what is at its ends. An adapter is an end of the walk, too: it counts as the layer that it stands for, and what
# it trains.


# %%
def rows_of(module, path="", depth=0):
    """(depth, name, weights, trained numbers, packed) of the module and all under it, a tied weight once."""
    name = path.rpartition(".")[2]
    if isinstance(module, Adapter):
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        return [
            (depth, name, module.in_features * module.out_features, trained, isinstance(module.base_layer, QuantLinear))
        ]
    found = [row for child, part in module.named_children() for row in rows_of(part, f"{path}.{child}", depth + 1)]
    own = 0 if name == "lm_head" else sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return [(depth, name, own, 0, False), *found] if own or found or name == "lm_head" else []


def draw(axes, title, model):
    rows = rows_of(model, title)
    for at, (*_, weights, trained, packed) in enumerate(rows):
        if weights:
            axes.barh(at - 0.17, weights, 0.34, left=1, color="#d98c3f" if packed else "#9aa7b1")
        if trained:
            axes.barh(at + 0.17, trained, 0.34, left=1, color="#2a7f4f")
    labels = ["    " * depth + name for depth, name, *_ in rows]
    labels = [label.ljust(max(map(len, labels))) for label in labels]  # of one width, so that they begin at one line
    axes.set_yticks(range(len(rows)), labels, family="monospace", fontsize=8)
    axes.set(xscale="log", xlim=(100, 1e8), xlabel="numbers in the module itself", title=title)
    axes.invert_yaxis()


figure, both = plt.subplots(1, 2, figsize=(11, 4.6))
draw(both[0], "GPT-2", gpt2)
draw(both[1], "SmolLM2", smollm2)
colours = {"frozen": "#9aa7b1", "packed (and frozen)": "#d98c3f", "trained": "#2a7f4f"}
figure.legend(handles=[Patch(color=c, label=n) for n, c in colours.items()], loc="lower center", ncols=3, frameon=False)
figure.tight_layout(rect=(0, 0.06, 1, 1))
plt.show()

# %% [markdown]
# From the top to the bottom: an *embedding* (`wte`, `embed_tokens`) gives each token its vector, and GPT-2 has a second one for places
# (`wpe`). A block has two halves. The *attention* (`attn`) lets a token look at those before it, and the *MLP* works on each token alone.
# *Norms* (`ln`, `norm`) keep the numbers at one size. The last layer, `lm_head`, gives every token that could come next a number. In both
# models it has no weight of its own: it uses the embedding's, and is called *tied*. The axis is logarithmic: from one mark to the next is a
# hundred times.
#
# Where GPT-2 has one layer `c_attn` with three outputs in a row, SmolLM2 has `q_proj`, `k_proj` and `v_proj`. So a list of names that fits
# one model says nothing to another one, and `"all-linear"` fits both: every linear layer but `lm_head`.
#
# ## What a choice costs
#
# The measurement: the trained numbers of whole models with their 12 and 30 blocks, for three choices. Training keeps four numbers of 32
# bits for each of them: the number itself, its gradient, and two that Adam remembers. That is 16 bytes.

# %%
for title, model, blocks, choices in (
    ("GPT-2", gpt2, 12, (["c_attn"], ["c_fc"], "all-linear")),
    ("SmolLM2", smollm2, 30, (["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], "all-linear")),
):
    unload(model)
    for targets in choices:
        inject(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        trained = blocks * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        unload(model)
        print(
            f"{title:8} {'+'.join(targets) if isinstance(targets, list) else targets:28} {trained:9,} trained, {trained * 16 / 1e6:4.0f} MB"
        )

# %% [markdown]
# The first papers put adapters on the attention alone. Today all linear layers are usual (QLoRA, section 4). [The lab](../lab.md) compares
# attention and MLP with as many trained numbers on each side.
#
# And what packing saves, in one block of SmolLM2:

# %%
packed = [module for module in smollm2.modules() if isinstance(module, QuantLinear)]
weights = sum(layer.in_features * layer.out_features for layer in packed)
stored = sum(part.nbytes for layer in packed for part in layer.state_dict().values() if isinstance(part, torch.Tensor))
print(f"{weights:,} weights in {stored / 1e6:.2f} MB instead of {weights * 4 / 1e6:.2f} MB")

# %% [markdown]
# ## What would break if
#
# **… a name of another model were given?** If nothing is found, nothing must be trained in silence:

# %%
try:
    inject(gpt2, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]))
except TargetError as error:
    print(error)

# %% [markdown]
# **… the shapes were read from the weight?** GPT-2's linear layers are of another class, `Conv1D`, which keeps the weight the other way
# round: a row for each input. $A$ and $B$ would be made for the wrong numbers of inputs and outputs. In a square layer even that would not
# show, until the update is *merged*, that is added into the weight: it would be added the wrong way round.

# %%
for layer in (gpt2.transformer.h[0].mlp.c_fc, torch.nn.Linear(768, 3072)):
    print(f"{type(layer).__name__:8} 768 inputs, 3072 outputs, weight {tuple(layer.weight.shape)}")

# %% [markdown]
# ## Exercises
#
# `minilora learn 3` puts the exercises of this lesson into a file of yours, and `minilora learn check 3` grades what you wrote. How
# minilora finds the layers stands in {source}`lora/match`, and how it takes a layer's place in {source}`lora/slots`.
