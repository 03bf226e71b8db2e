# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 1 · What a low rank is
#
# **The question.** Fine-tuning a model means training it a little more, on new text. Each of its weights, a matrix $W$ of many numbers,
# becomes $W + \Delta W$. The matrix $\Delta W$ is called the *update*. LoRA (*low-rank adaptation*) learns it with few numbers. How can
# that be enough?
#
# Take a column $u$ of `out` numbers and a row $v^\top$ of `in` numbers. Their product $u v^\top$ is a matrix with `out` rows and `in`
# columns: a big table, made from few numbers. Here each such product is called a *direction*. A matrix that is the sum of $r$ of them,
# and of no fewer, has *rank* $r$. Every matrix can be written in this way, and the *singular value decomposition* (SVD) finds the best
# way to do it:
#
# $$M = \sigma_1 u_1 v_1^\top + \sigma_2 u_2 v_2^\top + \dots , \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0 .$$
#
# All $u_i$ and $v_i$ have length 1, so the *singular value* $\sigma_i$ says how large the part $i$ is. To keep the first $r$ parts alone
# is to *cut* $M$ to rank $r$; it takes $r \cdot (\text{out} + \text{in})$ numbers instead of $\text{out} \cdot \text{in}$. No matrix of
# rank $r$ is nearer to $M$: the sum of the squares of the differences (the squared *Frobenius norm* of the difference) is smaller for
# none.

# %%
import matplotlib.pyplot as plt
import torch

from minilora.lab.byte_model import byte_model, code


def cut(matrix, r):
    """The matrix of rank r that is nearest."""
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * sigma[:r]) @ v[:r]


# %% [markdown]
# ## A picture as a matrix
#
# A grey picture is a matrix of brightness. This one is computed: sky, sun, two hills, and a sea with waves. The *length* of a matrix is
# the square root of the sum of the squares of its numbers. The *error* is the length of the difference, divided by the length of the
# picture.

# %%
y, x = torch.meshgrid(torch.linspace(0, 1, 120), torch.linspace(0, 1.5, 180), indexing="ij")
picture = 0.9 - 0.5 * y + 0.5 * torch.exp(-((x - 1.1) ** 2 + (y - 0.25) ** 2) / 0.01)
for base, dark in ((0.45, 0.45), (0.58, 0.25)):
    ridge = base + 0.08 * torch.sin(5 * x + 9 * base) + 0.03 * torch.sin(17 * x)
    picture = torch.where(y > ridge, torch.tensor(dark), picture)
picture = torch.where(y > 0.72, 0.55 + 0.2 * torch.sin(90 * y**2 + 3 * torch.sin(6 * x)) * y, picture)

figure, axes = plt.subplots(2, 2, figsize=(6.5, 5))
for one, r in zip(axes.flat, (1, 5, 20, 120), strict=True):
    kept, numbers = cut(picture, r), r * sum(picture.shape)
    one.imshow(kept, cmap="gray", vmin=0, vmax=1.2)
    one.set(title=f"rank {r}: {numbers:,} numbers", xlabel="column", ylabel="row")
    error = (kept - picture).norm() / picture.norm()
    print(f"rank {r:3}: {numbers:6,} numbers instead of {picture.numel():,}, error {error:5.1%}")
figure.tight_layout()
plt.show()

# %% [markdown]
# A few directions hold most of the picture, because its rows are like each other: what is known of one tells much of the next. What is
# sharp and slanted, as the edge of a hill, takes many. At the full rank the sum takes more numbers than the picture itself.
#
# ## A real update
#
# The byte model comes with minilora. It is a language model of 0.8 million weights that has read English. It reads byte by byte, and says
# for each byte how likely it is to come next. Its *loss* says how badly it guesses; here it is given in bits a byte. Here all of its
# linear layers learn from Python code, forty steps, without LoRA. A *linear layer* is a layer that multiplies by a weight.

# %%
torch.manual_seed(0)
model = byte_model()
weights = {name: weight for name, weight in model.named_parameters() if "proj" in name}  # the linear layers
before = {name: weight.detach().clone() for name, weight in weights.items()}
text, others = (torch.frombuffer(bytearray(code(held_out)), dtype=torch.uint8).long() for held_out in (False, True))
unseen = others[: len(others) // 64 * 64].view(64, -1)[:, :128]  # 64 pieces of code that is not learnt from


@torch.no_grad()
def bits():
    """The mean loss on unseen code, in bits a byte: a guess among 256 equally likely bytes would cost 8."""
    return float(model(input_ids=unseen, labels=unseen).loss / torch.log(torch.tensor(2.0)))


start = bits()
optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in weights.values()], lr=5e-4, weight_decay=0.0)
for _ in range(40):
    pieces = text[torch.randint(len(text) - 128, (4, 1)) + torch.arange(128)]
    model(input_ids=pieces, labels=pieces).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
updates = {name: weight.detach() - before[name] for name, weight in weights.items()}
print(f"before {start:.3f} bits a byte, after {bits():.3f}")

# %% [markdown]
# ## How many of its directions count
#
# The measurement: cut the update of every layer to rank $r$, add it to the old weight, and ask for the loss again. *Size* is the sum of
# the squares of all singular values, which is the sum of the squares of all numbers of the matrix. *Gain* is how far the loss has fallen.
# The rank of a matrix is at most its shorter side, which is 128 here, and 64 in some of the layers.

# %%
ranks, losses, sizes = (0, 1, 2, 4, 8, 16, 32, 128), [], []
for r in ranks:
    kept = {name: cut(update, r) for name, update in updates.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(before[name] + kept[name])
    losses.append(bits())
    sizes.append(sum(u.square().sum() for u in kept.values()) / sum(u.square().sum() for u in updates.values()))
gains = [(start - loss) / (start - losses[-1]) for loss in losses]
for r, loss, size, gain in zip(ranks, losses, sizes, gains, strict=True):
    print(f"rank {r:3}: {loss:.3f} bits a byte, {gain:4.0%} of the gain, {size:4.0%} of the size")

full = sum(int(torch.linalg.matrix_rank(update)) == min(update.shape) for update in updates.values())
print(f"{full} of {len(updates)} updates have the highest rank that their shape allows")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
name = "model.layers.2.mlp.down_proj.weight"
noise = torch.randn_like(updates[name])
for label, matrix in (("update", updates[name]), ("weight", before[name]), ("random numbers", noise)):
    sigma = torch.linalg.svdvals(matrix)
    left.plot(range(1, len(sigma) + 1), sigma / sigma.square().sum().sqrt(), label=label)
    first = sigma[:16].square().sum() / sigma.square().sum()
    print(f"left picture, {label:14}: the first 16 directions hold {first:.0%} of the size")
left.set(xlabel="place of the singular value", ylabel="singular value (whole: 1)", title="one layer", xscale="log")
right.plot(ranks[:-1], gains[:-1], "o-", label="gain")
right.plot(ranks[:-1], sizes[:-1], "o-", label="size")
right.set(xlabel="rank kept (at most 128)", ylabel="share of the whole update", title="all layers", ylim=(0, 1.1))
for one in (left, right):
    one.legend(frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# The first directions of the update are larger than those of random numbers. In this layer the weight lies between the two: it is spread
# less evenly than random numbers, and more evenly than the update. Behind the first sixteen directions of the update comes a long tail,
# which still holds much of the size and does little for the loss. So the update has a high rank, and a low rank is enough for most of its
# use. LoRA never forms the whole update: from the beginning it learns two small matrices, $r$ columns and $r$ rows, whose product has
# rank $r$ at most. Such a pair of matrices beside a weight is called an *adapter*.
#
# ## What would break if
#
# **… the weight itself were cut?** What the model knows is spread over many directions of $W$. The update is cut to rank 16 in the first
# line, $W$ in the second:

# %%
with torch.no_grad():
    for label, old, new in (("update", 128, 16), ("weight", 16, 128)):
        for name, weight in weights.items():
            weight.copy_(cut(before[name], old) + cut(updates[name], new))
        print(f"{label} cut to rank 16: {bits():.2f} bits a byte")

# %% [markdown]
# **… the updates of two adapters were added?** The sum of two matrices of rank $r$ has rank $2r$ as a rule. So two adapters of rank 4 do
# not fit into one of rank 4:

# %%
one, other = (torch.randn(40, 4) @ torch.randn(4, 30) for _ in range(2))
both = one + other
error = (cut(both, 4) - both).norm() / both.norm()
print(f"rank {torch.linalg.matrix_rank(both)}; cut to rank 4, the error is {error:.0%}")

# %% [markdown]
# ## Exercises
#
# `minilora learn 1` puts the exercises of this lesson into a file of yours, and `minilora learn check 1` grades what you wrote. The next
# lesson trains a matrix of rank $r$.
