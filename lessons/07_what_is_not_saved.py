# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 7 · The backward pass, and what is not saved
#
# **The question.** A weight in 4 bits must be decoded before it can be multiplied with. Training needs it twice: once on the way forward
# and once on the way back. How can a model of many layers be trained without ever holding all of its decoded weights?
#
# The *forward pass* computes the output of each layer from its input, layer after layer. The *backward pass* goes the other way: it is
# given the *gradient* of the output, which says how the loss $L$ changes with each number of it, and computes the gradient of the input.
# For a linear layer with $M$ rows of input $x$ and a weight $W$,
#
# $$y = x W^\top, \qquad \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\, W, \qquad
# \frac{\partial L}{\partial W} = \left(\frac{\partial L}{\partial y}\right)^{\!\top} x .$$
#
# The third equation is for a weight that learns. A *frozen* weight does not learn, and then only the second one is left: it needs $W$ and
# not $x$. So PyTorch must keep something from the forward pass for the backward pass, and what it keeps is what costs memory. This
# function counts it. PyTorch calls our function `note` with each tensor that it keeps; a tensor that is there anyway, because it belongs
# to the layers, is not counted.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from minilora import QuantConfig, quantize
from minilora.linear.fused import lora_linear
from minilora.linear.ops import quant_linear

torch.manual_seed(0)
M, width, layers, r, lora_alpha = 256, 1024, 8, 8, 16
scaling = lora_alpha / r


def chain(product, *parts_of_layers):
    y = x
    for parts_of_one in zip(*parts_of_layers, strict=True):
        y = product(y, *parts_of_one)
    return y


def kept_for_backward(held, *arguments):
    """MB that the forward pass ``chain(*arguments)`` keeps beyond the tensors ``held``; the same memory counts once."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in held}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = chain(*arguments)  # as long as y lives, so does what was kept
    return sum(kept.values()) / 1e6 if y.requires_grad else 0.0


# %% [markdown]
# ## Four ways to multiply with a frozen weight
#
# The first has a dense weight, that is, one in 32 bits. The second decodes the packed weight and lets PyTorch do the rest. The third says
# itself what the backward pass is: nothing is kept but the bytes that are there anyway, and the weight is decoded once more on the way
# back. The fourth is minilora's, which does the same.

# %%
dense = [torch.randn(width, width) / width**0.5 for _ in range(layers)]
stored = [quantize(weight, QuantConfig("nf4", blocksize=64, double_quant=True)) for weight in dense]
parts = [part for s in stored for part in (s.packed, s.absmax, s.nested_absmax, s.nested_offset)]
x = torch.randn(M, width, requires_grad=True)


class PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.dequantize().T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(), None


ways = {
    "dense": (dense, F.linear),
    "packed, PyTorch": (stored, lambda y, weight: F.linear(y, weight.dequantize())),
    "packed, by hand": (stored, PackedProduct.apply),
    "packed, minilora": (stored, quant_linear),
}
gradients = {}
for name, (weights, product) in ways.items():
    (gradients[name],) = torch.autograd.grad(chain(product, weights).sum(), x)
    print(f"{name:16} kept {kept_for_backward([x, *dense, *parts], product, weights):4.1f} MB")
expected = gradients["packed, PyTorch"]
for name in ("packed, by hand", "packed, minilora"):
    print(f"{name}: gradient off by {(gradients[name] - expected).norm() / expected.norm():.0e}")

# %% [markdown]
# The second way gives away what the 4 bits have saved: PyTorch keeps every decoded weight until the backward pass has used it. The third
# and the fourth keep nothing, and their gradient is the same. The price is time: each weight is decoded twice. minilora's product does
# not even hold one large decoded weight whole: it decodes some rows, multiplies, and goes on in the same memory.
#
# ## With an adapter beside each layer
#
# LoRA adds $\frac{\alpha}{r} B A x$ to each layer's output, with $\alpha$ for `lora_alpha`. $A$ and $B$ learn, so the third equation is
# back, for them: the gradient of $A$ needs $x$, and that of $B$ needs $A x$, which is thin ($r$ numbers a row). With *dropout*, which
# sets random inputs of $A$ to zero in training, PyTorch keeps two things as large as $x$: the mask, which says what was dropped, and the
# input without it. minilora keeps the seed from which the mask was drawn, and draws the same mask again.
#
# So what is kept can be predicted with pencil and paper. In numbers of 4 bytes a layer:
#
# | | PyTorch | minilora |
# |---|---|---|
# | frozen weight | $\text{in} \cdot \text{out}$, decoded | nothing |
# | the input of $A$ | $M \cdot \text{in}$ | $M \cdot \text{in}$ |
# | $A x$ | $M \cdot r$ | $M \cdot r$ |
# | more with dropout | $M \cdot \text{in}$, the mask | nothing |
#
# The input of the first layer is there anyway and is not counted, unless what is kept is a copy of it with zeros in it.

# %%
A = [(torch.randn(r, width) / width**0.5).requires_grad_() for _ in range(layers)]
B = [torch.zeros(width, r, requires_grad=True) for _ in range(layers)]


def by_pytorch(y, weight, A, B, p=0.0):
    return F.linear(y, weight.dequantize()) + F.linear(F.linear(F.dropout(y, p) if p else y, A), B) * scaling


def by_minilora(y, weight, A, B, p=0.0):
    return lora_linear(y, weight, None, A, B, scaling, p)


frozen, inputs, thin = layers * width * width, M * width, layers * M * r
cases = {
    "PyTorch": (by_pytorch, 0.0, frozen + (layers - 1) * inputs + thin),
    "minilora": (by_minilora, 0.0, (layers - 1) * inputs + thin),
    "PyTorch, dropout": (by_pytorch, 0.1, frozen + 2 * layers * inputs + thin),
    "minilora, dropout": (by_minilora, 0.1, (layers - 1) * inputs + thin),
}
predicted = [4 * numbers / 1e6 for _, _, numbers in cases.values()]
held = [x, *parts, *A, *B]
counted = [kept_for_backward(held, product, stored, A, B, [p] * layers) for product, p, _ in cases.values()]
for name, guess, found in zip(cases, predicted, counted, strict=True):
    print(f"{name:18} predicted {guess:6.3f} MB, counted {found:6.3f} MB")
print(f"decoded weights of a model of 7 billion weights: {4 * 7e9 / 1e9:.0f} GB")

figure, axes = plt.subplots(figsize=(7, 3.6))
axes.bar([place - 0.2 for place in range(4)], predicted, 0.38, color="#9db7cc", label="predicted")
axes.bar([place + 0.2 for place in range(4)], counted, 0.38, color="#1f4e79", label="counted")
axes.axhline(sum(s.nbytes for s in stored) / 1e6, color="#c0504d", label="the packed weights themselves")
axes.set(xticks=range(4), xticklabels=cases, ylabel="kept for the backward pass (MB)", ylim=(0, 62))
axes.legend(frameon=False, ncols=3, loc="upper left")
plt.show()

# %% [markdown]
# The decoded weights are by far the largest part, and there are as many of them as there are layers. They are what stands between a large
# model and a small GPU. [Plan and bench](../guides/plan-and-bench.md) predicts all parts of a training step for a real model.
#
# ## What would break if
#
# **… the weight were not frozen?** Then the backward pass needs the third equation for it: PyTorch keeps every layer's input even without
# an adapter, a gradient as large as the dense weight is made, and the optimizer keeps two more such numbers. Freezing
# (`requires_grad_(False)`) saves them all.
#
# **… somebody changed the packed bytes between the two passes?** The gradient would be that of another model. Our `PackedProduct` does
# not see it, because it keeps the weight where PyTorch does not look. minilora hands the bytes to PyTorch (`save_for_backward`), which
# compares a count of changes:

# %%
weight, ones = stored[0], torch.ones(M, width)
right = ones @ weight.dequantize()
for name, product in (("by hand", PackedProduct.apply), ("minilora", quant_linear)):
    y = product(x, weight)
    weight.packed.bitwise_xor_(255)  # every code becomes 15 less itself
    try:
        (gradient,) = torch.autograd.grad(y, x, ones)
        print(f"{name}: no complaint, and the gradient is off by {(gradient - right).norm() / right.norm():.0%}")
    except RuntimeError as error:
        print(f"{name}: refused: {str(error).split(':')[0]}")
    weight.packed.bitwise_xor_(255)

# %% [markdown]
# ## Exercises
#
# `minilora learn 7` puts the exercises of this lesson into a file of yours, and `minilora learn check 7` grades what you wrote.
