"""Which curve of a probe a server's answers lie on: one distance, the scale that fits best, and a sentence.

The distance of two answers is the root mean square difference of their log-probabilities, each token weighted by its probability (the mean
of both), in nats: near 0 it is the square root of twice the Kullback-Leibler divergence. Rounding moves it by thousandths, packing the base
otherwise by hundredths to tenths, and an adapter that has learnt something by ones. What was measured stands in ``docs/guides/verify.md``.
Next file: ``proof/ask.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minilora.proof.probe import ADAPTED, BASE, Probe, Question
from minilora.quant.gguf.formats import FORMATS

__all__ = ["Answer", "Verdict", "distance", "effect", "exact_for", "fitted", "judge", "told_effect"]

# Token to log-probability, the likeliest ones: below 0 what is none of the probe's tokens, NaN for one of which nothing is known.
Answer = Mapping[int, float]
# Nats. Measured on SmolLM2-135M in llama.cpp with an adapter that moves the answers by 7.5 (``benchmarks/verify_demo.py``): fp32 served as
# F16 is 0.001 off, dequantized Q4_1 served as that Q4_1 file 0.06 (products with packed blocks round the activations), as Q8_0 0.05, NF4
# served as F16 or Q4_1 0.4; half the scale is 0.7 off, no adapter 8. ``benchmarks/verify.py`` has the cases of a small model.
_EXACT = 0.02  # the same weights in fp32, computed in another order
_HALF = 0.07  # the same weights, in 16 bits
_BLOCKS = 0.15  # the same packed blocks of a GGUF file, whose activations llama.cpp rounds and minilora does not
# Likewise in blocks of 256, where as many activations have one scale: of normal ones the largest of 256 is 1.35 times that of 32.
_LONG_BLOCKS = 0.2
_NEAR, _MOST_NEAR = (
    0.35,
    1.5,
)  # share of the adapter's effect that another packing of the base may be off by; and nats at the most
_EXPLAINED = 0.35  # a scale tells why answers are off if it leaves no more than this of it
_HALVED = 0.5  # a mistake tells why answers are off if it leaves no more than this: what rounding adds is nearer to no other curve
_OFF = 0.08  # in a fitted scale: nearer to 1 than this it is 1
_OFF_NEAR = 0.25  # likewise of 0, beside another packing
_STEP = 0.01


@dataclass(frozen=True)
class Verdict:
    """What is the matter.

    Attributes:
        kind: "right", "not applied", "scale", "misread", "another packing",
            "another base", "another adapter", "another adapter or base", "another template", "another beginning", "unknown".
        text: a sentence. scale: that fits best. distances: of the base, of the adapted model, of the best fit, in nats. code: to exit with.
    """

    kind: str
    text: str
    scale: float
    distances: tuple[float, float, float]
    code: int


def judge(probe: Probe, answers: Sequence[Answer], bases: Sequence[Answer] | None = None) -> Verdict:
    """What a server does, from its answers to the questions of a probe in their order.

    Args:
        bases: its answers without any adapter, where it can be asked for them.
    """
    exact, moved = exact_for(probe), effect(probe, answers)
    base, adapted = (distance(probe, answers, probe.place(name)) for name in (BASE, ADAPTED))
    scale, off = fitted(probe, answers)
    told = (base, adapted, off)
    if moved < 3 * exact or max(base, adapted) <= exact:
        return _too_small(told, exact, moved)
    found = _misread(probe, answers, moved, min(told))
    mistaken = found is not None and found[1] <= _HALVED * adapted and adapted > exact / 4
    if adapted <= exact and abs(scale - 1) <= _OFF and not mistaken:
        return Verdict("right", f"applied right: {_off(adapted)} from what was measured here", scale, told, 0)
    if base <= exact:
        return Verdict("not applied", f"not applied: these are the answers of the base, {_off(base)}", scale, told, 1)
    if off <= exact and (found is None or off <= found[1]):
        return Verdict("scale", f"applied with scale {scale:.2f} instead of 1 ({_off(off)})", scale, told, 1)
    if found is not None:
        return Verdict(
            "misread", f"applied otherwise than it was trained: {found[0]} ({_off(found[1])})", scale, told, 1
        )
    return _on_another_base(probe, bases, moved, scale, told)


def _on_another_base(
    probe: Probe,
    bases: Sequence[Answer] | None,
    moved: float,
    scale: float,
    told: tuple[float, float, float],
) -> Verdict:
    """Nothing fits as if it were the same base: what is left is another packing of it, another base or another adapter."""
    exact, (of_none, of_all, off) = exact_for(probe), told
    near = min(_NEAR * moved, _MOST_NEAR)
    of_base = distance(probe, bases, probe.place(BASE)) if bases else None
    if of_base is not None and of_base <= exact:
        if off <= near and off <= _EXPLAINED * of_all:
            return Verdict(
                "scale", f"applied with scale {scale:.1f} or near it, instead of 1 ({_off(off)})", scale, told, 1
            )
        text = f"another adapter: the base is right, and no scale of this one fits ({_off(off)})"
        return Verdict("another adapter", text, scale, told, 1)
    if of_base is not None and of_base > near:
        text = f"another base: without the adapter it is {_off(of_base)} already"
        return Verdict("another base", text, scale, told, 1)
    said = f"another quantization of the same base: {{}} of an effect of {moved:.2f}"
    if of_all <= near and off > _EXPLAINED * of_all:
        return Verdict("another packing", f"applied, on {said.format(_off(of_all))}", scale, told, 1)
    if of_none <= near and (scale <= _OFF_NEAR or off > _EXPLAINED * of_none):
        return Verdict("not applied", f"not applied, and on {said.format(_off(of_none))}", scale, told, 1)
    if off <= near:
        text = f"applied with scale {scale:.1f} or near it, instead of 1, perhaps on {said.format(_off(off))}"
        return Verdict("scale", text, scale, told, 1)
    which = "another adapter" if of_base is not None else "another adapter or base"
    return Verdict(which, f"{which}: no scale of this one fits ({_off(off)})", scale, told, 1)


def _too_small(told: tuple[float, float, float], exact: float, moved: float) -> Verdict:
    if min(told[:2]) > max(exact, 3 * moved):
        return Verdict("another adapter or base", f"another adapter or base: {_off(min(told[:2]))}", 1.0, told, 1)
    text = f"cannot be told: the adapter moves what was answered by {moved:.4f} only; seal it with --prompts that it was trained for"
    return Verdict("unknown", text, 1.0, told, 2)


def _misread(probe: Probe, answers: Sequence[Answer], moved: float, others: float) -> tuple[str, float] | None:
    """The mistake that the answers are nearest to, if it is the same base; on another packing of it, if the mistake explains what the best
    of all else (``others``, nats) does not.
    """
    each = [
        (curve.name, distance(probe, answers, at)) for at, curve in enumerate(probe.curves) if curve.kind == "misread"
    ]
    best = min(each, key=lambda one: one[1], default=None)
    exact, near = min(exact_for(probe), moved / 3), min(_NEAR * moved, _MOST_NEAR)
    return best if best is not None and best[1] <= max(exact, min(near, _HALVED * others)) else None


def _off(value: float) -> str:
    return f"{value:.4f} nats off"


def exact_for(probe: Probe) -> float:
    """Nats within which answers are the same, by how the base lay in memory."""
    blocks = [form.weights for name, form in FORMATS.items() if name in probe.packing]
    if blocks or "gguf" in probe.packing.lower():
        return _LONG_BLOCKS if max(blocks, default=0) > 32 else _BLOCKS
    return _EXACT if probe.dtype == "float32" else _HALF


def effect(probe: Probe, answers: Sequence[Answer] | None = None) -> float:
    """How far base and adapted model are from each other, in nats; of the questions and tokens that ``answers`` tell of, if given."""
    rows = [question.log_probs[probe.place(ADAPTED)] for question in probe.questions]
    listed = probe.curves[probe.place(ADAPTED)].listed
    own = [_top(question.tokens, row, listed) for question, row in zip(probe.questions, rows, strict=True)]
    if answers is not None:
        own = [_told(mine, theirs) for mine, theirs in zip(own, answers, strict=True)]
    return distance(probe, own, probe.place(BASE)) if any(own) else 0.0


def _told(mine: Answer, theirs: Answer) -> dict[int, float]:
    """``mine`` without what ``theirs`` says nothing of; {} where that is all."""
    found = {token: math.nan if math.isnan(theirs.get(token, 0.0)) else value for token, value in mine.items()}
    return found if theirs and not all(map(math.isnan, found.values())) else {}


def told_effect(probe: Probe) -> str:
    """A line: how well this probe can tell the base from the adapted model."""
    moved, count = effect(probe), len(probe.questions)
    if moved < 3 * exact_for(probe):
        return f"the adapter moves the answers to {count} questions by {moved:.4f} nats only: a server that leaves it out cannot be told"
    return f"{count} questions, whose answers the adapter moves by {moved:.2f} nats"


def _top(tokens: Sequence[int], row: Sequence[float], count: int) -> dict[int, float]:
    order = sorted(range(len(row)), key=lambda at: -row[at])[:count]
    return {tokens[at]: row[at] for at in order}


def distance(probe: Probe, answers: Sequence[Answer], at: int) -> float:
    """Nats between answers and curve number ``at``."""
    squares = [
        _square(question, answer, question.log_probs[at], probe.curves[at].listed)
        for question, answer in zip(probe.questions, answers, strict=True)
        if answer
    ]
    return math.sqrt(sum(squares) / len(squares))


def fitted(probe: Probe, answers: Sequence[Answer]) -> tuple[float, float]:
    """The scale whose curve is nearest, and how far that is. Between the scales that were measured log-probabilities are interpolated."""
    knots = sorted((curve.scale, at) for at, curve in enumerate(probe.curves) if curve.kind == "scale")
    asked = [(question, answer) for question, answer in zip(probe.questions, answers, strict=True) if answer]
    most, listed = knots[-1][0], min(probe.curves[at].listed for _, at in knots)

    def off(scale: float) -> float:
        weights = _weights([knot for knot, _ in knots], scale)
        total = 0.0
        for question, answer in asked:
            rows = [(weight, question.log_probs[at]) for weight, (_, at) in zip(weights, knots, strict=True) if weight]
            row = [sum(weight * row[token] for weight, row in rows) for token in range(len(question.tokens))]
            total += _square(question, answer, row, listed)
        return math.sqrt(total / len(asked))

    coarse = min((most * step / 40 for step in range(41)), key=off)
    near = [scale for step in range(-12, 13) if 0 <= (scale := coarse + _STEP / 2 * step * most / 1.2) <= most]
    best = min(near, key=off)
    return best, off(best)


def _weights(knots: Sequence[float], at: float) -> list[float]:
    """Of a parabola through the three knots nearest to ``at`` (Lagrange); through all, if there are fewer."""
    near = sorted(sorted(range(len(knots)), key=lambda number: abs(knots[number] - at))[:3])
    weights = [0.0] * len(knots)
    for one in near:
        weights[one] = math.prod((at - knots[other]) / (knots[one] - knots[other]) for other in near if other != one)
    return weights


def _square(question: Question, answer: Answer, row: Sequence[float], listed: int) -> float:
    """Mean square difference of one answer. What one side does not list is, on that side, at most the least that it lists."""
    least, cut = (
        min(value for value in answer.values() if not math.isnan(value)),
        sorted(row, reverse=True)[min(listed, len(row)) - 1],
    )
    known = dict(zip(question.tokens, row, strict=True))
    total = weights = 0.0
    for token in {*answer, *known}:
        theirs, ours = answer.get(token), known.get(token)
        if theirs is None and ours is not None:
            if ours <= least:
                continue
            theirs = least
        if ours is None and theirs is not None:
            if theirs <= cut:
                continue
            ours = cut
        if theirs is None or ours is None or math.isnan(theirs):
            continue
        weight = (math.exp(theirs) + math.exp(ours)) / 2
        total, weights = total + weight * (theirs - ours) ** 2, weights + weight
    return total / weights if weights else 0.0
