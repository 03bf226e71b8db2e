"""Ask a chat model: prompts through its chat template, greedy by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minilora.data.chat.template import asked
from minilora.errors import DataError
from minilora.training.progress import busy


class _Ticks:
    """What transformers calls a streamer: it is given the prompt, and then each token, of all rows."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick, self.begun = tick, False

    def put(self, tokens: object) -> None:
        """Count the tokens, not the prompt."""
        if self.begun:
            self.tick()
        self.begun = True

    def end(self) -> None:
        """Nothing is left to show."""


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    system: str = "",
) -> list[str]:
    """The model's answer to each prompt, all generated in one batch; a bar for its tokens stands in the ``Progress`` that is shown.

    Args:
        model: a causal language model; its training mode is left as it was.
        tokenizer: with a chat template, through which each prompt goes as one user turn; without, prompts go in as they are.
        max_new_tokens: at most, for each.
        system: a system turn that is put before each prompt, "" for none; only of what has a chat template.
        temperature: 0 is greedy; above, tokens are drawn from torch's generator.

    Returns:
        The new texts only, special tokens removed.

    Raises:
        DataError: the chat template fails, does not end, or refuses a prompt; or there is none that could hold a system turn.
    """
    if not prompts:
        return []
    if system and not tokenizer.chat_template:
        raise DataError("system: the tokenizer has no chat template that could hold a system turn; leave it out")
    texts = asked(tokenizer, prompts, system) if tokenizer.chat_template else list(prompts)
    # Generation goes on at the right end, so short prompts are padded on the left.
    encoded = tokenizer(
        texts, add_special_tokens=not tokenizer.chat_template, padding=True, padding_side="left", return_tensors="pt"
    )
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    choice |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), busy("answering", max_new_tokens) as tick:
            out = model.generate(**inputs, **choice, streamer=_Ticks(tick))
    finally:
        model.train(training)
    return [tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() for row in out]
