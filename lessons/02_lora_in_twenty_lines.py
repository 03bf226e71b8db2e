# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 2 · LoRA in twenty lines
#
# **The question.** A layer multiplies its input $x$ by a weight $W$. The weight is *frozen*: it must not change. What can be trained
# beside it, so that training begins exactly where the model is, costs little, and learns about as quickly with any rank?
#
# LoRA (low-rank adaptation, Hu et al. 2021) puts the product of two thin matrices beside the weight. $A$ has $r$ rows and as many columns
# as the layer has inputs, $B$ has as many rows as the layer has outputs and $r$ columns, so their product has rank $r$ at most (lesson
# 1). The pair is called an *adapter*. Only $A$ and $B$ are trained:
#
# $$y = W x + s \, B A x , \qquad s = \frac{\alpha}{r} .$$
#
# The number $s$ is called the *scaling*. The user chooses $\alpha$ (`lora_alpha`) and $r$; who tries another $r$ leaves $\alpha$ as it
# is. In the beginning $B$ is zero and $A$ is random.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import minilora


class LoRA(nn.Module):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__()
        self.base_layer, self.scaling = base_layer.requires_grad_(False), lora_alpha / r
        bound = base_layer.in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))

    def forward(self, x):
        return self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


torch.set_default_dtype(torch.float64)  # 64 bits a number, so that rounding does not hide a mistake
torch.manual_seed(0)
base_layer = nn.Linear(40, 24)
x = torch.randn(200, 40)

layer = LoRA(base_layer, r=4, lora_alpha=12)
print("the same output before the first step:", torch.equal(layer(x), base_layer(x)))

# %% [markdown]
# The input passes through $A$ and then through $B$. The big matrix $BA$ is never formed, so the layer stays cheap: $r \cdot (40 + 24)$
# multiplications for an input instead of $40 \cdot 24$ more.
#
# ## The gradients by hand
#
# A *gradient* says how the loss $L$ grows when a number grows a little; training moves each number against its gradient. Let $G$ be the
# gradient of a whole weight at this place, $G = \sum (\partial L / \partial y) \, x^\top$, summed over all inputs. By the chain rule
#
# $$\frac{\partial L}{\partial B} = s \, G A^\top , \qquad \frac{\partial L}{\partial A} = s \, B^\top G .$$
#
# torch computes gradients by itself; this is called *autograd*. The two must agree.


# %%
change = torch.randn(40, 3) @ torch.randn(3, 24) / 8  # what is to be learnt: a matrix of rank 3


def loss_of(layer, x):
    return (layer(x) - base_layer(x) - x @ change).square().mean()


with torch.no_grad():
    layer.lora_B.normal_()  # any values but zero, or half of the comparison would be 0 = 0
loss_of(layer, x).backward()
slope = 2 * (layer(x) - base_layer(x) - x @ change).detach() / (200 * 24)  # dL/dy of the mean of squares
G = slope.T @ x
by_hand = {"B": layer.scaling * G @ layer.lora_A.T, "A": layer.scaling * layer.lora_B.T @ G}
for name, autograd in (("B", layer.lora_B.grad), ("A", layer.lora_A.grad)):
    difference = (autograd - by_hand[name]).abs().max()
    print(f"gradient of {name}: largest {autograd.abs().max():.4f}, largest difference {difference:.0e}")

# %% [markdown]
# And minilora's layer, with the same $A$ and $B$ in it, has the same gradients. `inject` puts an adapter into the place of each layer
# that `target_modules` names, and `"0"` is the name of the first layer of a `Sequential`:

# %%
theirs = nn.Sequential(nn.Linear(40, 24))
theirs.load_state_dict({"0.weight": base_layer.weight, "0.bias": base_layer.bias})
minilora.inject(theirs, minilora.LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
with torch.no_grad():
    theirs[0].lora_A.copy_(layer.lora_A)
    theirs[0].lora_B.copy_(layer.lora_B)
loss_of(theirs, x).backward()
difference = theirs[0].lora_A.grad - layer.lora_A.grad
print(f"largest difference {difference.abs().max():.0e}: minilora keeps A and B in 32 bits")

# %% [markdown]
# ## Why B is zero and A is random
#
# With $B = 0$ the update is zero, so the layer starts as what it was. The gradient of $B$ is $s\,GA^\top$, and a random $A$ makes it
# something: $B$ moves in the first step. The gradient of $A$ has the factor $B^\top$, so $A$ waits for the second step. If both were
# zero, both gradients would be zero, for ever. If both were random, the model would start at a larger loss: part of what it knew is lost,
# and must be learnt back. The first table below prints the loss, and the length (the *norm*) of both gradients in the first two steps.
# The left picture draws the loss.
#
# ## What alpha / r does
#
# *Adam* is the usual way to train. In its first step it moves each number by about the *learning rate* (a small number that the user
# chooses), however large the gradient is. The output is then moved by a sum of $r$ parts, one for each row of $A$. If the inputs are much
# alike, all parts pull the same way, and the sum grows nearly as $r$. If the inputs point everywhere, the parts partly cancel, and the
# sum grows more slowly, about as $\sqrt r$. So with a fixed scaling a layer with a larger rank moves faster, and the learning rate that
# is good for one rank is bad for another. LoRA leaves $\alpha$ as it is, so $s$ falls as $1 / r$: this is the careful answer. rsLoRA
# (Kalajdzievski 2023) divides $\alpha$ by $\sqrt r$ instead. The right picture measures all three.


# %%
def run(inputs, r, lora_alpha, start="B zero, A random", steps=1, seed=0):
    """By step the loss before it and the norms of the gradients of A and B, and how far the output has moved in all."""
    torch.manual_seed(seed)
    layer, losses, norms = LoRA(base_layer, r, lora_alpha), [], []
    with torch.no_grad():
        if start in ("both zero", "A zero, B random"):
            layer.lora_A.zero_()
        if start in ("both random", "A zero, B random"):
            layer.lora_B.uniform_(-0.5, 0.5)
    optimizer, began = torch.optim.Adam(layer.parameters(), lr=0.01), layer(inputs).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(layer, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append((layer.lora_A.grad.norm(), layer.lora_B.grad.norm()))
    return losses, norms, float((layer(inputs) - began).detach().square().mean().sqrt())


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for start in ("B zero, A random", "A zero, B random", "both zero", "both random"):
    losses, ((A1, B1), (A2, B2), *_), _ = run(x, 4, 12, start, steps=100)
    print(f"{start}: loss {losses[0]:.3f} before, {losses[-1]:.3f} after 100 steps")
    print(f"    gradient of A {A1:.2f} in step 1, {A2:.2f} in step 2; of B {B1:.2f}, {B2:.2f}")
    left.plot(losses, label=start)
left.set(xlabel="step", ylabel="loss", title="how it starts")
ranks = (1, 2, 4, 8, 16, 32, 64)
alike = x / 4 + torch.randn(40)  # one large part that all inputs share
for label, inputs, colour in (("alike", alike, "C0"), ("everywhere", x, "C1")):
    for scaling, power, line in (("1", 0, "-"), ("1 / √r", 0.5, "--"), ("1 / r", 1, ":")):
        moved = [sum(run(inputs, r, r ** (1 - power), seed=seed)[-1] for seed in range(20)) for r in ranks]
        ratio = [value / moved[0] for value in moved]
        print(f"inputs {label}, scaling {scaling}: r = 64 moves the output {ratio[-1]:.2f} times as far as r = 1")
        right.loglog(ranks, ratio, f"o{line}", color=colour, label=f"{label}, {scaling}")
right.set_xticks(ranks, ranks, minor=False)
right.minorticks_off()
right.set(xlabel="rank r", ylabel="change of the output (r = 1: 1)", title="the first step of Adam", ylim=(0.1, 500))
left.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.42))
right.legend(frameon=False, fontsize=8, title="inputs, scaling", loc="upper left", ncols=2)
figure.tight_layout()
plt.show()

# %% [markdown]
# A figure of 1 means that the first step is as large with rank 64 as with rank 1. Where the inputs are alike, $\alpha / r$ comes near to
# it. Where they point everywhere it slows large ranks down; $\alpha / \sqrt r$ comes nearer there, and in the first case it makes the
# step of rank 64 several times larger. Which is better for a whole run is a question for a measurement, and [the lab](../lab.md) has one.
#
# ## What would break if
#
# **… A were zero and B random, the other way round?** Nothing at once: it starts from the same loss and learns, as the orange line shows.
# But the two ways do not learn alike, and the learning rates that you read about are meant for $B = 0$.
#
# **… the scaling got lost?** A file of an adapter holds $A$ and $B$, and $\alpha$ stands in another file beside it. A program that reads
# $A$ and $B$ and takes another scaling computes an update of the wrong size, and nothing complains:

# %%
meant = layer(x) - base_layer(x)
layer.scaling = 1.0
wrong = layer(x) - base_layer(x) - meant
print(f"with scaling 1 instead of 12 / 4 the update is wrong by {wrong.norm() / meant.norm():.0%}")

# %% [markdown]
# ## Exercises
#
# `minilora learn 2` puts the exercises of this lesson into a file of yours, and `minilora learn check 2` grades what you wrote. The layer
# that minilora uses is {source}`lora/layer`; what it has beside these twenty lines is dropout, a bias, and a faster way to the same
# numbers.
