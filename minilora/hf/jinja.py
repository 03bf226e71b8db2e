"""A chat by a template alone, without the tokenizer that it belongs to. Next file: ``hf/generate.py``."""

from __future__ import annotations

from collections.abc import Sequence

from minilora.hf.folders import import_transformers

__all__ = ["write_chat"]


def write_chat(template: str, turns: Sequence[tuple[str, str]]) -> str:
    """The chat and the beginning of its answer, without the token that begins a text; raises whatever the template raises."""
    import_transformers()
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": role, "content": text} for role, text in turns]
    written, _ = render_jinja_template(
        conversations=[chat], chat_template=template, add_generation_prompt=True, bos_token="", eos_token=""
    )
    return str(written[0])
