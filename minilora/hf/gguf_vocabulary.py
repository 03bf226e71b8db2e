"""What a GGUF file says of a tokenizer: its vocabulary, merges, kinds of tokens, and the name of the rule by which text is cut.

llama.cpp has the rules in its code, under names. A tokenizer's own rule is known by what it does: it must cut a text that is full of traps
as the rule of the name does (``hf/gguf_tokenizer.py`` has them). A tokenizer that cuts in another way, or is of another kind than
byte-level BPE, is refused, for llama.cpp would make other tokens of a text, in silence. Next file: ``hf/gguf_merge.py``.
"""

from __future__ import annotations

import json
from typing import Any

from minilora.errors import CheckpointError
from minilora.hf.gguf_tokenizer import CUTS, Cut

__all__ = ["vocabulary"]

_TRAPS = (
    "Hello  World!! it's we'LL I'M don'T 1 12 123 12345 x1y22 3.14 1,000 a_b-c  \t\n\n  \r\n tail   ",
    "naïve Ünïcödé ÉCOLE camelCaseWord HTTPServer ǅ ʰ 日本語テキスト 한국어 мир ١٢٣ Ⅷ ½ 👩‍👩‍👧 e\u0301 \u00a0\u2003x",
    "def f(x):\n    return {'a': [1, 2]}  # \"c\"\n\n\n/path/to//x <|tag|> a\n/b \n\n c?!.../\n",
    " lead", "two  spaces", "end ", "\n", " \n x", "'s 'S 's's", "a'b", "１２３", "x²³ 4th", "\u200bz", "",
)  # fmt: skip
_NORMAL, _CONTROL, _OWN, _UNUSED = 1, 3, 4, 5


def vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Entries of the metadata, by their whole names.

    Args:
        rows: of the embedding; those that no token has, are called unused.

    Raises:
        CheckpointError: it is no byte-level BPE, or cuts text by no rule that llama.cpp has a name for.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    model = content.get("model") or {}
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or content.get("normalizer")
        or not _byte_level(content)
    ):
        raise CheckpointError(
            f"{type(tokenizer).__name__}: its tokenizer is no byte-level BPE, and no other is written; use llama.cpp's converter, "
            "or merge into a GGUF file that has the tokenizer (--model FILE.gguf)"
        )
    _refuse_odd(content, model)
    name = _rule(backend.pre_tokenizer, bool(model.get("ignore_merges")))
    tokens, kinds = _tokens(tokenizer, content, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **_special(tokenizer),
    }
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, of which chats without a name are written by this one
        template = template.get("default")
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return {key: value for key, value in found.items() if value != []}


def _refuse_odd(content: dict[str, Any], model: dict[str, Any]) -> None:
    """What a tokenizer can do and llama.cpp has no entry for."""
    for entry in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(entry):
            raise CheckpointError(
                f"the tokenizer has {entry}={model[entry]!r}, which llama.cpp does not know; use a tokenizer without"
            )
    for added in content.get("added_tokens", ()):
        if kept := [side for side in ("lstrip", "rstrip", "single_word") if added.get(side)]:
            raise CheckpointError(
                f"the tokenizer's token {added['content']!r} has {kept[0]}=True, which llama.cpp does not know; use its converter, or "
                "merge into a GGUF file that has the tokenizer (--model FILE.gguf)"
            )


def _byte_level(content: dict[str, Any]) -> bool:
    steps = content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    last = parts[-1] if parts else {}
    return last.get("type") == "ByteLevel" and not last.get("add_prefix_space")


def _rule(own: Any, whole: bool) -> str:
    """The name of the rule that cuts as ``own`` does."""
    from tokenizers import Regex, pre_tokenizers

    wanted = [_pieces(own, text) for text in _TRAPS]

    def cuts(cut: Cut) -> bool:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        made = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        return all(_pieces(made, text) == pieces for text, pieces in zip(_TRAPS, wanted, strict=True))

    for name, cut in CUTS.items():
        if cut.whole == whole and cuts(cut):
            return name
    raise CheckpointError(
        "the tokenizer cuts text by a rule that none of llama.cpp's names here stands for; use llama.cpp's converter, or merge into "
        "a GGUF file that has the tokenizer (--model FILE.gguf)"
    )


def _pieces(rule: Any, text: str) -> list[str]:
    return [piece for piece, _ in rule.pre_tokenize_str(text)]


def _tokens(tokenizer: Any, content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [_UNUSED] * rows
    for text, number in tokenizer.get_vocab().items():
        if number >= rows:
            raise CheckpointError(f"the tokenizer's token {number:,} has no row in the embedding, which has {rows:,}")
        tokens[number], kinds[number] = text, _NORMAL
    for added in content.get("added_tokens", ()):
        kinds[added["id"]] = _CONTROL if added["special"] else _OWN
    return tokens, kinds


def _special(tokenizer: Any) -> dict[str, Any]:
    """Which tokens begin, end and fill a text, and whether it begins and ends with them."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {f"tokenizer.ggml.{said}_token_id": getattr(tokenizer, f"{own}_token_id") for own, said in names.items()}
    found: dict[str, Any] = {key: number for key, number in numbers.items() if number is not None}
    plain, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    begins = len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id
    ends = len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id
    if len(ids) != len(plain) + begins + ends:
        raise CheckpointError(
            "the tokenizer puts more around a text than one token that begins and one that ends it; use llama.cpp's own"
        )
    return found | {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
