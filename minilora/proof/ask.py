"""Ask a server the questions of a probe: after these tokens, which one comes next, and with which log-probability?

Servers differ in how they are asked and in how they answer. Each way is tried on the first question, and the one that gives
log-probabilities is kept: OpenAI's ``/v1/completions`` with token ids (vLLM, SGLang, llama.cpp), llama.cpp's own ``/completion``, the first
with text, and Ollama's ``/api/generate``. Tokens are known by their ids where the server gives them, else by their texts.
Next file: ``proof/verdict.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from minilora.errors import ServerError
from minilora.proof.probe import Chat, Question
from minilora.proof.wire import Refused, base_of, call

__all__ = ["Server"]

_TOP = 20  # vLLM gives no more unless it is started so
_FEW = 5  # OpenAI's own limit
_LEAST = 2  # tokens of an answer that tell something
_LOWEST = -1e3  # of a token that can come; what sampling has cut off servers write as -9999 or -inf
_LARGEST_SCALE = 1e9
_WHOLE = 1e-5  # of a probability: what rounding leaves of 1
_OPENAI = {"max_tokens": 1, "temperature": 0}
_Body = Callable[[Question], tuple[str, dict[str, Any]]]


class Server:
    """A server at ``url``, asked for the model of this name; "" takes the one that it has.

    Args:
        seconds: that each answer may take. key: a bearer token, "" for none.

    Raises:
        ConfigError: no such address can be. ServerError: nobody answers, or there are several models and none was named.
    """

    def __init__(self, url: str, model: str = "", seconds: float = 60.0, key: str = "") -> None:
        self.url, self.seconds, self.key = base_of(url), seconds, key
        self.listed = self._models()
        self.model = model or self._only()
        self._way: _Body | None = None
        self._text_alone, self._bare = False, False
        self._knows_ids = False  # it has answered with ids of its own
        self._totals: list[float] = []  # probability of what was listed, an answer each
        own = any(entry.get("owned_by") == "llamacpp" for entry in self.listed)
        self._extra: dict[str, Any] = {"cache_prompt": False} if own else {}

    def _call(self, path: str, body: Any = None) -> Any:
        return call(self.url + path, body, self.seconds, self.key)

    # ---- models

    def _models(self) -> list[dict[str, Any]]:
        """What the server says that it has, as far as it says it."""
        try:
            said = self._call("/v1/models")
        except Refused:
            return []
        data = said.get("data") if isinstance(said, dict) else None
        models = data if isinstance(data, list) else []
        return [entry for entry in models if isinstance(entry, dict) and isinstance(entry.get("id"), str)][:10_000]

    def _only(self) -> str:
        """The one adapter, where the server says which of its models are adapters (vLLM), or the one model."""
        names = [entry["id"] for entry in self.listed]
        adapters = [entry["id"] for entry in self.listed if entry.get("parent")]
        if len(names) > 1 and len(adapters) != 1:
            raise ServerError(
                f"{self.url}: serves {len(names)} models ({self._names()}); name the one with the adapter with --model"
            )
        return (adapters if len(names) > 1 else names or ["default"])[0]

    def _names(self) -> str:
        names = [entry["id"] for entry in self.listed]
        return ", ".join(names[:6]) + " ..." * (len(names) > 6)

    def without_adapter(self) -> Server | None:
        """The same server asked for its base, where it says which model that is, as vLLM does.

        llama.cpp would take a scale with a request, but gives what it computed so to later requests that begin alike: it is not asked so.
        """
        parent = next((entry.get("parent") for entry in self.listed if entry["id"] == self.model), None)
        if not isinstance(parent, str) or all(entry["id"] != parent for entry in self.listed):
            return None
        bare: Server = object.__new__(Server)
        vars(bare).update(vars(self) | {"model": parent, "_way": None, "_totals": []})
        return bare

    def by_text(self, question: Question) -> Server | None:
        """The same server asked by text alone; None where that is how it is asked already, or where it speaks of ids itself."""
        if self._way is None or self._knows_ids or not isinstance(self._way(question)[1]["prompt"], list):
            return None
        other: Server = object.__new__(Server)
        vars(other).update(vars(self) | {"_text_alone": True, "_way": None, "_totals": []})
        return other

    def loaded(self) -> list[float] | None:
        """The scales of the adapters that llama.cpp says it has; None where the server does not say."""
        try:
            said = self._call("/lora-adapters")
        except ServerError:
            return None
        entries = said if isinstance(said, list) else [None]
        scales: list[Any] = [entry.get("scale") if isinstance(entry, dict) else None for entry in entries[:100]]
        known = all(type(scale) in (int, float) and abs(scale) < _LARGEST_SCALE for scale in scales)
        return [float(scale) for scale in scales] if known else None

    # ---- questions

    def answers(self, questions: Sequence[Question], tick: Callable[[], None] = lambda: None) -> list[dict[int, float]]:
        """The log-probabilities of the likeliest next tokens after each question; {} for one that the server says none to.

        llama.cpp has none where its word is half a letter.

        Raises:
            ServerError: the server cannot be asked, or gives no log-probabilities; with what it said.
        """
        found: list[dict[int, float]] = []
        self._bare = all(_without_space(text) == text for question in questions for text in question.texts)
        why: ServerError = _NoLogProbs(f"{self.url}: was asked nothing")
        for question in questions:
            try:
                found.append(self._answer(question))
            except _NoLogProbs as error:
                found.append({})
                why = error
            tick()
        if len(found) - found.count({}) < max(_LEAST, len(found) // 4):
            raise why
        return found

    def drawn(self, questions: Sequence[Question]) -> bool:
        """Whether the answers were what sampling leaves: those listed have all probability, and on every curve others have some."""
        least = min(max(sum(map(math.exp, row)) for row in question.log_probs) for question in questions)
        return all(abs(total - 1) < _WHOLE for total in self._totals) and least < 1 - 100 * _WHOLE

    def _answer(self, question: Question) -> dict[int, float]:
        complaints: list[ServerError] = []
        for way in [self._way] if self._way is not None else []:
            with suppress(_NoLogProbs):
                return self._by(way, question)
        for way in self._ways():
            try:
                answer = self._by(way, question)
            except (Refused, _NoLogProbs) as error:
                complaints.append(error)
                continue
            self._way = self._way or way
            return answer
        said = next((error for error in complaints if isinstance(error, _NoLogProbs)), complaints[0])
        unknown = self.listed and all(entry["id"] != self.model for entry in self.listed)
        if unknown and isinstance(said, Refused) and said.status == 404:  # vLLM names its base alone
            raise ServerError(f"{said}; --model={self.model!r} is none of those that it lists: {self._names()}")
        raise said

    def _by(self, way: _Body, question: Question) -> dict[int, float]:
        path, body = way(question)
        said = self._call(path, body | self._extra)
        self._count(said, question)
        entries = list(_listed(said, self.url + path))
        self._knows_ids = self._knows_ids or any(number is not None for number, _, _ in entries)
        self._totals.append(sum(math.exp(value) for _, _, value in entries))
        if self._bare:
            entries = [(number, _without_space(text), value) for number, text, value in entries]
        return _in_tokens(entries, question, self.url + path)

    def _count(self, said: Any, question: Question) -> None:
        """Note it where the server counts other tokens than were sent; text goes without its beginning-of-text token."""
        usage = said.get("usage") if isinstance(said, dict) else None
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if type(count) is int and abs(count - len(question.ids)) > 1:
            raise _NoLogProbs(
                f"{self.url}: counts {count} tokens where {len(question.ids)} were sent; it does not take token ids as they are"
            )

    def _ways(self) -> Iterator[_Body]:
        """Every way of asking, the best first."""
        if not self._text_alone:
            yield self._completions(_TOP, return_tokens_as_token_ids=True)  # vLLM: no two tokens look alike then
            yield self._completions(_TOP)
            yield self._completions(_FEW)
            yield lambda q: ("/completion", {"prompt": list(q.ids), "n_predict": 1, "n_probs": _TOP, "temperature": 0})
        yield self._ollama
        yield lambda q: ("/v1/completions", self._openai(_FEW) | {"prompt": _text(q, self.url)})

    def _openai(self, top: int) -> dict[str, Any]:
        return {"model": self.model, "logprobs": top, **_OPENAI}

    def _completions(self, top: int, **more: Any) -> _Body:
        return lambda q: ("/v1/completions", self._openai(top) | {"prompt": list(q.ids)} | more)

    def _ollama(self, question: Question) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "prompt": _text(question, self.url), "raw": True, "stream": False}
        drawn = {"temperature": 0, "num_predict": 1}
        return "/api/generate", body | {"logprobs": True, "top_logprobs": _TOP, "options": drawn}

    # ---- chat

    def rendered(self, chat: Chat) -> tuple[str, str | list[int] | int] | None:
        """What the server's chat template makes of a conversation: text, ids or their number, and who says so; None if nobody does."""
        turns = [dict(turn) for turn in chat.turns]
        asked: list[tuple[str, dict[str, Any], Callable[[Any], Any]]] = [
            ("/apply-template", {"messages": turns}, lambda said: said.get("prompt")),
            (
                "/tokenize",
                {"model": self.model, "messages": turns, "add_generation_prompt": True},
                lambda said: said.get("tokens"),
            ),
            (
                "/v1/chat/completions",
                {"model": self.model, "messages": turns, **_OPENAI},
                lambda said: said["usage"]["prompt_tokens"],
            ),
        ]
        for path, body, of in asked:
            try:
                value = of(self._call(path, body))
            except (
                ServerError,
                AttributeError,
                KeyError,
                TypeError,
            ):  # no answer is no verdict: there are other ways to ask
                continue
            whole = isinstance(value, list) and value and all(type(token) is int for token in value)
            if (isinstance(value, str) and value) or whole or (type(value) is int and value > 0):
                return path, value
        return None

    def counted(self, text: str) -> int | None:
        """How many tokens the server makes of a text, without a chat template; None where it does not say."""
        try:
            count = self._call("/v1/completions", {"model": self.model, "prompt": text, **_OPENAI})["usage"][
                "prompt_tokens"
            ]
        except (ServerError, KeyError, TypeError):
            return None
        return count if type(count) is int else None


class _NoLogProbs(ServerError):
    """An answer without log-probabilities."""


def _without_space(text: str) -> str:
    """A word without the space before it, as a tokenizer of sentencepiece decodes one alone; Ollama, for one, writes the space."""
    return text[1:] if len(text) > 1 and text[0] in " \u2581" and text[1] != " " else text


def _text(question: Question, url: str) -> str:
    if not question.text:
        raise _NoLogProbs(f"{url}: takes text alone, and a question of the probe has none that gives its tokens")
    return question.text


Entry = tuple[int | None, str, float]  # id where it is said, text, log-probability


def _listed(said: Any, where: str) -> Iterator[Entry]:
    """The likeliest tokens of the one position in an answer, in any of the forms that servers have."""
    entries = _position(said)
    if isinstance(entries, Mapping):  # OpenAI's completions: text to log-probability
        entries = [{"token": text, "logprob": value} for text, value in entries.items()]
    if not isinstance(entries, list) or not entries:
        raise _NoLogProbs(
            f"{where}: the answer has no log-probabilities; the server must give them (logprobs, n_probs)"
        )
    for entry in entries[:1_000]:
        text, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        if (
            not isinstance(text, str)
            or isinstance(value, bool)
            or not isinstance(value, int | float)
            or not _LOWEST < value <= 1e-3
        ):
            if (
                value is not None
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and value <= _LOWEST
            ):
                continue  # a token that cannot come
            raise ServerError(
                f"{where}: a log-probability is {str(entry)[:80]}; wanted a token and a finite number of at most 0"
            )
        number = entry.get("id")
        if number is None and text.startswith("token_id:") and text[9:].isascii() and text[9:].isdigit():
            number = int(text[9:18])
        yield (number if type(number) is int else None), text, float(value)


def _position(said: Any) -> Any:
    """The list of candidates for the first new token."""
    try:
        if "completion_probabilities" in said:  # llama.cpp's own
            return said["completion_probabilities"][0]["top_logprobs"]
        if "choices" not in said:  # Ollama's own
            return said["logprobs"][0]["top_logprobs"]
        found = said["choices"][0]["logprobs"]
        return found["content"][0]["top_logprobs"] if found.get("content") else found["top_logprobs"][0]
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def _in_tokens(entries: Sequence[Entry], question: Question, where: str) -> dict[int, float]:
    """Token to log-probability; what is none of the question's tokens gets a number below 0, one that nothing is known of NaN.

    A server that gives texts alone says nothing of tokens whose text is half a letter, or another token's too.
    """
    found: dict[int, float] = {}
    tokens: dict[str, int] = {}
    unclear: set[str] = set()
    if any(number is None for number, _, _ in entries):
        theirs = [text for _, text, _ in entries]
        for token, text in zip(question.tokens, question.texts, strict=True):
            if "\ufffd" in text or question.texts.count(text) > 1 or theirs.count(text) > 1:
                found[token] = math.nan
                unclear.add(text)
            else:
                tokens[text] = token
    for at, (number, text, value) in enumerate(entries):
        token = number if number is not None else tokens.get(text, -1)
        if token >= 0 or not ("\ufffd" in text or text in unclear):
            found[token if token >= 0 else -1 - at] = value
    known = [value for value in found.values() if not math.isnan(value)]
    if len(known) < _LEAST:
        raise _NoLogProbs(
            f"{where}: the answer has no log-probabilities of {_LEAST} tokens or more; wanted those of the likeliest 20, as the model "
            "has them, not as sampling leaves them (vLLM: --logprobs-mode raw_logprobs)"
        )
    return found
