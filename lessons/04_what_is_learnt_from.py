# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 4 · What is learnt from
#
# **The question.** A model reads one row of whole numbers. Data for fine-tuning is a conversation: a question, an answer, perhaps more of
# both. How does the one become the other, and which part of it is learnt?
#
# A *tokenizer* turns text into *tokens*, whole numbers that stand for pieces of it. Here a piece is a byte, so that every token can be
# seen. For each place $t$ the model gives all 256 tokens a *probability* $p$. The *loss* of a token is $-\log p$ of the one that stands
# there: 0 for a sure guess that is right, and larger the less it was expected. What is trained on is the mean over the tokens that are to
# be learnt, the set $T$:
#
# $$L = - \frac{1}{|T|} \sum_{t \in T} \log p(\text{token}_t \mid \text{all tokens before } t) .$$
#
# ## From turns to one text
#
# A *chat template* is a small program, kept with the tokenizer and written in a language called Jinja. It writes a conversation as one
# text. Each model family has its own; the model was trained with it, and understands it better than any other. Here is a simple one.

# %%
import matplotlib.pyplot as plt
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from minilora import LoraConfig, inject
from minilora.data.batches import collate
from minilora.data.encoding import Encoded, encode
from minilora.data.records import read_jsonl
from minilora.demo import DATA
from minilora.lab.byte_model import byte_model, decode
from minilora.training.losses import token_losses

TURN = "{{ m['role'] }}: {{ m['content'] }}<end>\n"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def byte_tokenizer(template):
    """Every token a byte. The tokenizer wants a printable letter for each byte: its own where it has one, a spare one elsewhere."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [byte for byte in range(256) if byte not in own]
    letters = {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(spare)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


tokenizer = byte_tokenizer(TEMPLATE)
records = read_jsonl(DATA)  # conversations with the keeper of a lighthouse, which come with minilora
print(tokenizer.apply_chat_template(records[0]["messages"], tokenize=False))

# %% [markdown]
# `<end>` says that a turn is over. When the model is asked, the template stops after `assistant: `, and the model goes on until it writes
# `<end>` itself.
#
# ## From text to labels
#
# Beside each token stands a *label*. It is the token once more where the model shall learn it, and -100 where it shall not; the loss leaves
# -100 out. This is the *mask*. The question is given when the model is used, so there is nothing to learn about it. The answer is learnt,
# and its end too.

# %%
example = encode(records[0], tokenizer, max_length=256)
for at in range(36, 48):
    token, label = example.input_ids[at], example.labels[at]
    print(f"{at}: {chr(token)!r:5} token {token:3}  label {label:4}", end="   " if at % 2 == 0 else "\n")
print(f"{example.supervised} of {len(example.input_ids)} tokens are learnt")

# %% [markdown]
# The model sees the tokens before place $t$, so what it says *at* a token is about the *next* one. The labels are therefore moved by one
# place when the loss is computed. `token_losses` of minilora does this.
#
# ## Before and after
#
# The last conversation is kept aside. The byte model, which has never seen a conversation, is asked for the loss of each token of it. Then
# it learns from the others, forty steps with LoRA, and is asked again.

# %%
torch.manual_seed(0)
model = byte_model()
inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
examples = [encode(record, tokenizer, 256) for record in records]
unseen = examples.pop()


@torch.no_grad()
def losses_of(ids):
    """The loss of every token but the first, in nats: the unit of the natural logarithm."""
    return token_losses(model, collate([Encoded(ids, ids)], 0))


@torch.no_grad()
def answer(question, most=60):
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    return repr(decode(said[0, ids.shape[1] :]))


question = records[-1]["messages"][0]["content"]
before = losses_of(unseen.input_ids)
print("before:", answer(question))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
for _ in range(40):
    some = [examples[at] for at in torch.randint(len(examples), (4,))]
    token_losses(model, collate(some, 0)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
after = losses_of(unseen.input_ids)
print("after: ", answer(question))

learnt = torch.tensor(unseen.labels[1:]) != -100
for name, part in (("question and names", ~learnt), ("answer", learnt)):
    print(f"{name:18} {before[part].mean():.2f} nats a token before, {after[part].mean():.2f} after")

# %% [markdown]
# The picture shows the text that was kept aside, letter by letter: red where the model did not expect it. What is grey is not learnt.


# %%
norm = plt.Normalize(0, 8, clip=True)
STYLE = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 8}


def draw(axes, losses, title, width=72):
    for at, (token, loss) in enumerate(zip(unseen.input_ids[1:], losses.tolist(), strict=True), 1):
        row, column = divmod(at, width)
        colour = plt.cm.Reds(norm(loss)) if unseen.labels[at] != -100 else "#dddddd"
        axes.add_patch(plt.Rectangle((column, row), 1, 1, color=colour, linewidth=0))
        axes.text(column + 0.5, row + 0.5, chr(token).replace("\n", "↵"), **STYLE)
    axes.set(xlim=(0, width), ylim=(row + 1, 0), title=title, yticks=[], xlabel="place in the line")


figure, axes = plt.subplots(2, 1, figsize=(10, 3.4))
draw(axes[0], before, "before")
draw(axes[1], after, "after")
axes[0].set_xlabel("")
figure.tight_layout()
figure.colorbar(plt.cm.ScalarMappable(norm, plt.cm.Reds), ax=axes, label="loss (nats)", fraction=0.02, pad=0.01)
plt.show()

# %% [markdown]
# What all answers share, the keeper's first and last words and `<end>`, is expected now. The words between them differ from answer to
# answer, and a few dozen short answers teach a small model little about those. It has learnt a voice, and no knowledge.
#
# ## What would break if
#
# **… the model were asked with another template?** It was trained on answers that stand behind `assistant: `. Here is the same
# conversation, written in another way, with the same adapter:

# %%
others = {
    "its own": TEMPLATE,
    "another": "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}",
}
for name, template in others.items():
    example = encode(records[-1], byte_tokenizer(template), 256)
    with torch.no_grad():
        losses = token_losses(model, collate([example], 0))
    print(
        f"{name} template: the first 12 tokens of the answer cost {losses[:12].mean():.2f} nats, all {losses.mean():.2f}"
    )

# %% [markdown]
# **… everything were learnt, the question too?** Then a part of every step would go into guessing what users ask. In the conversation above
# the part of the loss that was outside of the answer, before training, was

# %%
print(f"{before[~learnt].sum() / before.sum():.0%}")

# %% [markdown]
# **… the end of the answer were not learnt?** The model would answer and go on, since nothing told it to stop. minilora takes the end of
# each turn into the mask, and says so where a template has none; [the guide to data](../guides/data.md) has all rules.
#
# ## Exercises
#
# `minilora learn 4` puts the exercises of this lesson into a file of yours, and `minilora learn check 4` grades what you wrote.
