"""The tokenizer in a GGUF file, cut as the file's own pre-tokenizer name says: the ids are those that llama.cpp makes of a text.

A file holds a vocabulary, merges, and a name (``tokenizer.ggml.pre``) for the rule by which text is cut into words before they are merged;
the rule itself is in llama.cpp. transformers passes over names that it does not know, and then cuts numbers in
another way than the model learned. Here a name is known and tested against llama.cpp, or refused. Next file: ``hf/smollm2.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, nearest
from minilora.files.validate import shown
from minilora.gguf.file import GGUF, open_gguf
from minilora.hf.folders import import_transformers, unreadable

__all__ = ["CUTS", "gguf_tokenizer"]

_NORMAL, _CONTROL, _OWN = 1, 3, 4  # kinds of token: a piece of text, what steers a model, what somebody added
_SPACE = "\u2581"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Cut:
    """How text is cut into words.

    Attributes:
        patterns: one after the other, each on what the ones before it left. whole: whether a word that is a token needs no merges.
        begins: whether a text begins with the token for that, where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False


# The patterns of llama.cpp, ``src/llama-vocab.cpp``.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), Cut((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), Cut((_DIGIT, _GPT2))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), Cut((_LLAMA3,), True, True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Cut((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), Cut((_QWEN2,))),
    "tekken": Cut((_TEKKEN,), True, True),
}


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer, with the chat template of the file.

    Raises:
        CheckpointError: the kind of vocabulary, or the name of its pre-tokenizer, is not known; or parts do not fit together.
    """
    transformers = import_transformers()
    with open_gguf(path) as file:
        build = _BUILDERS.get(file.said("tokenizer.ggml.model", str, ""))
        if build is None:
            raise CheckpointError(
                f"{path}: its tokenizer is of the kind {shown(file.metadata.get('tokenizer.ggml.model'))}; known are "
                f"{', '.join(_BUILDERS)}; {_WAY_OUT}"
            )
        try:
            backend, begins = build(file)
            _add_tokens(backend, file)
            begins = file.said("tokenizer.ggml.add_bos_token", bool, begins)
            ends = file.said("tokenizer.ggml.add_eos_token", bool, False)
            return transformers.PreTrainedTokenizerFast(
                tokenizer_object=backend,
                add_bos_token=begins,
                add_eos_token=ends,
                chat_template=file.said(_TEMPLATE, str),
                **_special(file),
            )
        except Exception as error:
            raise unreadable(str(path), error) from None


_WAY_OUT = "take the tokenizer from the model that the file was made of"


def _tokens(file: GGUF) -> list[str]:
    tokens = file.items("tokenizer.ggml.tokens", str)
    embedded = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(tokens)
    if not tokens or len(tokens) > embedded:
        raise CheckpointError(
            f"{file.path}: has {len(tokens):,} tokens, and an embedding of {embedded:,}; wanted a text for each"
        )
    return tokens


def _special(file: GGUF) -> dict[str, str]:
    found = {}
    for name, key in _SPECIAL.items():
        place = file.said(f"tokenizer.ggml.{key}_token_id", int)
        if place is not None:
            found[name] = _token(file, key, place)
    return found


def _token(file: GGUF, key: str, place: int) -> str:
    tokens = _tokens(file)
    if not 0 <= place < len(tokens):
        raise CheckpointError(f"{file.path}: its {key} token is number {place:,} of {len(tokens):,}")
    return tokens[place]


def _kinds(file: GGUF) -> list[int]:
    """Of each token; all are pieces of a text where nothing is said."""
    tokens, kinds = _tokens(file), file.items("tokenizer.ggml.token_type", int)
    if kinds and len(kinds) != len(tokens):
        raise CheckpointError(f"{file.path}: has {len(kinds):,} kinds for {len(tokens):,} tokens; wanted one for each")
    return kinds or [_NORMAL] * len(tokens)


def _byte_level(file: GGUF) -> tuple[Any, bool]:
    """A vocabulary of bytes written as letters, and merges; and whether a text begins with its token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.said("tokenizer.ggml.pre", str, "default")
    cut = CUTS.get(name)
    if cut is None:
        raise CheckpointError(
            f"{file.path}: its text is cut by a rule called {shown(name)}, which is not known here (the closest names are "
            f"{nearest(name, CUTS)}); {_WAY_OUT}"
        )
    pairs = [merge.split(" ") for merge in file.items("tokenizer.ggml.merges", str)]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise CheckpointError(f"{file.path}: has a merge of {len(wrong[0])} parts; wanted two")
    vocabulary = {token: place for place, token in enumerate(_tokens(file))}
    backend = Tokenizer(models.BPE(vocabulary, [(one, two) for one, two in pairs], ignore_merges=cut.whole))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, cut.begins


def _pieces(file: GGUF) -> tuple[Any, bool]:
    """Sentencepiece's vocabulary: pieces with scores, of which the best pair is merged first; what is no piece is written in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = _tokens(file), file.items("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: has {len(scores):,} scores for {len(tokens):,} tokens; wanted one for each"
        )
    vocabulary = {token: place for place, token in enumerate(tokens)}
    unknown = _token(file, "unknown", file.said("tokenizer.ggml.unknown_token_id", int, 0))
    merges = _merges(file, vocabulary, scores)
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    before = [normalizers.Prepend(_SPACE)] if file.said("tokenizer.ggml.add_space_prefix", bool, True) else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if before else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend, True


def _merges(file: GGUF, vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that make a piece, best piece first. A piece that steers a model, or is a byte, is not merged."""
    kinds = _kinds(file)
    plain = {piece for piece, place in vocabulary.items() if kinds[place] == _NORMAL}
    best = sorted(plain, key=lambda piece: (-scores[vocabulary[piece]], vocabulary[piece]))
    return [
        (piece[:cut], piece[cut:])
        for piece in best
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]


_BUILDERS = {"gpt2": _byte_level, "llama": _pieces}


def _add_tokens(backend: Any, file: GGUF) -> None:
    """The tokens that are found in a text as they stand, before it is cut: those that steer a model, and those that somebody added."""
    from tokenizers import AddedToken

    tokens, kinds = _tokens(file), _kinds(file)
    found = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _OWN) and token
    ]
    backend.add_special_tokens([token for token in found if token.special])
    backend.add_tokens([token for token in found if not token.special])
