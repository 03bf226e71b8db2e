# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 12 · Reading a fine-tuning
#
# **The question.** A run has ended and its loss is lower than before. Was it a good run? What has the model learnt, what has it lost, and
# was the learning rate right?
#
# Four things can be measured, and none of them alone is enough.
#
# - *Learning*: the loss on text of the new kind that was not trained on. Here it is given in nats a byte, as lesson 4 explains.
# - *Size*: the length of the update of a layer, divided by the length of its weight, $\|\Delta W\| / \|W\|$.
# - *Spectrum*: the singular values of the update, as in lesson 1. They say in how many directions it goes, and how far.
# - *Forgetting*: how far the model's guesses about other text have moved. With $p$ the probabilities before and $q$ those after, it is the
# *KL divergence*, which is 0 for equal guesses and never less:
#
# $$\operatorname{KL}(p \,\|\, q) = \sum_{\text{byte}} p(\text{byte}) \, \log \frac{p(\text{byte})}{q(\text{byte})} .$$
#
# A *learning rate* is how far a step goes. It is the setting that matters most, so the reading is done for five of them. For each there are
# two runs with another *seed*, the number from which all random choices follow: what two seeds differ by is no effect of the rate.

# %%
from statistics import mean

import matplotlib.pyplot as plt
import torch

from minilora import LoraConfig
from minilora.lab import sweep, trials_of
from minilora.lab.byte_model import byte_model, code, docs, text_examples
from minilora.lab.measures import effective_rank, forgetting, intruder_dimensions, spectrum, update_norms
from minilora.training.settings import TrainConfig

model = byte_model()  # it has read English, and learns code
examples, unseen = text_examples(code(), 64)[::40], text_examples(code(held_out=True), 64)[::150]
english = text_examples(docs(held_out=True), 64)[::60]
spectra = {}


def measure(model, result):
    """What is asked of each run when it has ended; its adapter is active then."""
    spectra[result.name] = spectrum(model, result.name)
    other = forgetting(model, english, result.name)
    return {
        "kl": other.kl,
        "worse": other.loss_difference,
        "size": mean(norm.relative for norm in update_norms(model, result.name).values()),
        "directions": mean(map(effective_rank, spectra[result.name].values())),
        "intruders": sum(found.count for found in intruder_dimensions(model, 5, 0.5, result.name).values()),
    }


# %% [markdown]
# A *sweep* trains all of them. The model is held once, and the ten adapters go through it together.

# %%
rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
grid = "lr=" + ",".join(map(str, rates))
trials = trials_of(grid, seeds=2, lora=lora, train=TrainConfig(steps=25))
results = sweep(model, examples, trials, evaluation=unseen, measure=measure, say=lambda line: None)
before = results[0].evaluations[0]
print(f"before: loss {before:.3f}")
print("rate    seed   loss   forgetting    size  directions  intruders")
for result in results:
    found = result.measured
    print(
        f"{result.trial.train.lr:<7g} {result.trial.train.seed:4}  {result.eval_loss:.3f}       {found['kl']:.4f}  {found['size']:5.1%}"
        f"         {found['directions']:.1f}  {found['intruders']:9}"
    )

# %% [markdown]
# ## Learning and forgetting

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
for axes, values in ((left, [r.eval_loss for r in results]), (middle, [r.measured["kl"] for r in results])):
    by_rate = [values[at : at + 2] for at in range(0, len(values), 2)]
    axes.plot(rates, [mean(pair) for pair in by_rate], "-", color="#2b6ca3")
    axes.plot([rate for rate in rates for _ in range(2)], values, "o", color="#2b6ca3", markersize=4, label="a run")
left.axhline(before, color="black", linestyle=":", label="before")
left.legend(frameon=False)
left.set(xscale="log", xlabel="learning rate", ylabel="loss on unseen code (nats a byte)", title="learning")
middle.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="KL on English (nats a byte)", title="forgetting")
layer = "model.layers.2.mlp.down_proj"
old = torch.linalg.svdvals(model.get_submodule(layer).weight)
right.semilogy(range(1, 9), old[:8], "k:", label="the weight")
for result in results[::2]:
    right.semilogy(range(1, 9), spectra[result.name][layer], ".-", label=f"update, {result.trial.train.lr:g}")
right.legend(frameon=False, fontsize=7, ncols=2)
right.set(xlabel="place", ylabel="singular value", ylim=(1e-3, None), title="spectrum of one layer")
figure.tight_layout()
plt.show()

# %% [markdown]
# **Learning** has a valley. Below its best rate a run is not wrong but unfinished: it would go on with more steps. Above it, the loss turns
# up steeply, and at the highest rate the model is worse at code than before it learnt any. The valley is not symmetric, so a rate a little
# too low costs less than one a little too high.
#
# **Forgetting** has no valley: it only grows with the rate. Left of the lowest loss a run learns a little less, and forgets much less.
# Which of the two is better depends on what the model is for, and no table can say it.
#
# **Size and spectrum** show the same without any text. A good update is small beside the weight. At the highest rate its singular values
# reach those of the weight, so it no longer adds to what the model knew but takes its place. The column *directions* is the effective rank:
# how many equal singular values would be as evenly spread as these. Near 8, all of $r = 8$ is in use; near 1 a smaller rank would do.
#
# *Intruders* are directions of the new weight, among its five strongest in each layer, to which the old weight had none alike (Shuttleworth
# et al. 2024). None is there while the rate is good, and then they come all at once.
#
# ## What would break if
#
# **… forgetting were read off the loss on English alone?** A loss is a mean over many bytes. It can stay, or even fall, while single
# guesses move in both directions. KL counts all of them. At the lowest rate:

# %%
for result in results[:2]:
    print(f"loss on English {result.measured['worse']:+.4f}, KL {result.measured['kl']:.4f} nats a byte")

# %% [markdown]
# **… the loss of the training were read?** It is measured on other pieces of text in every step, and it jumps. Its last value depends on
# which pieces came last. Here are the last four steps of the run with the lowest loss on unseen code:

# %%
lowest = min(results, key=lambda result: result.eval_loss)
print(
    f"rate {lowest.trial.train.lr:g}, unseen code {lowest.eval_loss:.3f}, training",
    [round(loss, 3) for loss in lowest.losses[-4:]],
)

# %% [markdown]
# **… there were one seed only?** Look at the table again: between two seeds of the best rate the loss differs about as much as between two
# rates beside each other. A difference between two settings that is smaller than that is not a result. [The lab](../lab.md) tests claims
# about LoRA with several seeds, and [the guide to sweeps](../guides/sweeps.md) does it with your model and your data.
#
# ## Exercises
#
# `minilora learn 12` puts the exercises of this lesson into a file of yours, and `minilora learn check 12` grades what you wrote.
