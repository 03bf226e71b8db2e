"""Ask a chat model: prompts through its chat template, greedy by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minilora.data.chat.template import asked


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 48, temperature: float = 0.0
) -> list[str]:
    """The model's answer to each prompt, all generated in one batch.

    Args:
        model: a causal language model; its training mode is left as it was.
        tokenizer: with a chat template, through which each prompt goes as one user turn; without, prompts go in as they are.
        max_new_tokens: at most, for each.
        temperature: 0 is greedy; above, tokens are drawn from torch's generator.

    Returns:
        The new texts only, special tokens removed.

    Raises:
        DataError: the chat template fails, does not end, or refuses a prompt.
    """
    if not prompts:
        return []
    texts = asked(tokenizer, prompts) if tokenizer.chat_template else list(prompts)
    # Generation goes on at the right end, so short prompts are padded on the left.
    encoded = tokenizer(
        texts, add_special_tokens=not tokenizer.chat_template, padding=True, padding_side="left", return_tensors="pt"
    )
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **choice)
    finally:
        model.train(training)
    return [tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() for row in out]
