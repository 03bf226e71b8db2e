"""docs/architectures.md: what became of every architecture of the installed transformers.

``python tests/architectures/table.py`` examines them all on every core (``--jobs 2`` on two) and writes the file;
``python tests/architectures/table.py llama t5`` examines these and puts their lines into it.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.architectures import checks, experts, tiny  # noqa: E402
from tests.architectures.checks import CHECKS, Outcome  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
WORDS = {
    "law": "the adapted model computes what the same model computes with `W + s B A` in its weights",
    "alive": "`check_adapter` finds that every adapted layer trains, or names one that does not",
    "step": "the gradients of A and B are those that the dense weights say; one step moves the adapter and nothing else",
    "merge": "merged it computes the same; unmerged it has the same bytes as before",
    "packed": "packed as NF4, with and without an adapter, it computes what the decoded weights compute",
    "reload": "saved and loaded onto the bare model it holds the same numbers and computes the same",
    "peft_reads": "PEFT loads what minilora saved and computes the same (within 1e-5, or the law within 1e-4)",
    "peft_writes": "minilora loads what PEFT saved and computes the same (within 1e-5)",
}
KINDS = {"right": "right", "refused": "refused by name", "PEFT": "PEFT at fault", "WRONG": "silent"}


def settle() -> None:
    """Each process: one thread, no talk."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)


def outcomes(model_types: list[str], jobs: int, say=lambda line: None) -> list[Outcome]:
    """Examine these, in ``jobs`` processes."""
    found = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, settle) as pool:
        for outcome in pool.map(checks.examine, model_types):
            found.append(outcome)
            if wrong := [f"{name}: {answer}" for name, answer in outcome.answers.items() if answer.startswith("WRONG")]:
                say(f"{outcome.model_type}: {'; '.join(wrong)}")
            if len(found) % 50 == 0:
                say(f"{len(found)} of {len(model_types)}")
    return found


def cell(text: str) -> str:
    """As Markdown takes it in a table: nothing in it is markup."""
    for sign in "\\`*_|<>[]{}$":
        text = text.replace(sign, "\\" + sign)
    return text


def row(outcome: Outcome) -> str:
    """One line of one of the two tables."""
    if outcome.not_built:
        return f"| {cell(outcome.model_type)} | {cell(why_not(outcome.not_built))} |"
    said = collections.defaultdict(list)
    for name, answer in outcome.answers.items():
        if answer != "right":
            said[answer].append(name)
    words = "; ".join(f"**{', '.join(map(cell, names))}** {cell(answer)}" for answer, names in said.items()) or "right"
    covered, whole = outcome.covers
    return f"| {cell(outcome.model_type)} | {cell(outcome.kind)} | {covered} of {whole} | {words} |"


def why_not(said: str) -> str:
    """An error of building in the page's words, without a path of this machine."""
    said = re.sub(r"<module '([\w.]+)' from '[^']*'>", r"the module \1", said)
    said = re.sub(r"^OverflowError: (.*parameters)$", r"larger than the 4 million parameters that are tried (\1)", said)
    return re.sub(r"^KeyError: '\w+ (has no head that is tried here)'$", r"\1", said)


def read() -> tuple[dict[str, str], dict[str, str]]:
    """Model type to its line, of those that are built and those that are not, as the page has them."""
    sections = re.split(r"^## .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| model type")]
        found.append({line[2:].partition(" |")[0].replace("\\", ""): line for line in lines})
    return found[0], found[1]


def answers(line: str) -> dict[str, str]:
    """Check to the kind of its answer, of a line of what is built."""
    said = re.findall(r"\*\*([^*]+)\*\* (\w+):", line)
    return dict.fromkeys(CHECKS, "right") | {
        name: kind for names, kind in said for name in names.replace("\\", "").split(", ")
    }


def page(built: dict[str, str], missing: dict[str, str]) -> str:
    """The whole file, from its lines: the counts are those of the lines."""
    given = [answers(line) for line in built.values()]
    counts = {name: collections.Counter(each[name] for each in given) for name in CHECKS}
    whole = sum(set(each.values()) == {"right"} for each in given)
    silent = sum(counts[name]["WRONG"] for name in CHECKS)
    lines = [
        "# Architectures",
        "",
        "<!-- written by `python tests/architectures/table.py`; do not edit -->",
        "",
        f"transformers {transformers.__version__} lists {len(built) + len(missing)} model types that have a model. {len(built)} of them "
        "are built here, tiny and from random numbers, and LoRA on all their linear layers (`all-linear`: experts among them, "
        "and not the output head and the routers) is asked eight questions. "
        f"{whole} are right in all eight, and {silent} answers are silently wrong: what minilora does not do, it refuses by name.",
        "",
        "| question | " + " | ".join(KINDS.values()) + " |",
        "|-|" + "-:|" * len(KINDS),
        *(
            f"| {name}: {WORDS[name]} | " + " | ".join(str(counts[name][kind]) for kind in KINDS) + " |"
            for name in CHECKS
        ),
        "",
        "*Refused by name* is an error of minilora, before anything has changed, that says which layer, why, and the way out. For `alive` "
        "it is a layer that the tiny batch does not reach (a tower without an image, a pooler that the loss does not use); the other "
        "questions are then asked without it. *PEFT at fault* means that PEFT raises, or computes something else than the law; minilora is "
        "then held to the law alone. Which numbers count as equal stands in `tests/architectures/checks.py`.",
        "",
        "The third column says how many of the weights that a model multiplies with have an adapter. Counted are linear layers, "
        "convolutions and matrices that are bare parameters; a projection of all experts is one. Tables whose rows are looked up are not "
        "counted.",
        "",
        "## Built",
        "",
        "| model type | class | adapted weights | answers |",
        "|-|-|-|-|",
        *(built[name] for name in sorted(built)),
        "",
        "## Not built",
        "",
        "What stands here says nothing about minilora: the type could not be made tiny, or called without a download. Whether yours works, "
        "`minilora.check_adapter(model, batch)` tells.",
        "",
        "| model type | why |",
        "|-|-|",
        *(missing[name] for name in sorted(missing)),
        "",
        *experts_of_transformers(),
    ]
    return "\n".join(lines)


def experts_of_transformers() -> list[str]:
    """The section on classes of experts, read in transformers' source."""
    about, own = experts.about(), experts.of_own_shape()
    return [
        "## Experts",
        "",
        f"{len(experts.CLASSES)} classes of transformers hold the weights of many experts in one parameter: "
        f"{len(experts.decorated())} carry its mark (`use_experts_implementation`), {len(own)} have a shape of their own. Each is in a "
        "tiny model or a small mixture, and is asked the same eight questions, and whether a gradient reaches the experts that got tokens "
        "and no others (`tests/architectures/test_experts.py`). Mixtures that keep their experts as a list "
        "of layers (Switch, NLLB) need nothing of this.",
        "",
        "| class | model type | beside gate and up `[E, 2 I, H]` and down `[E, H, I]` |",
        "|-|-|-|",
        *(f"| {cell(name)} | {cell(experts.model_type(name))} | {about[name]} |" for name in experts.CLASSES),
        "",
    ]


def lines_of(found: list[Outcome]) -> tuple[dict[str, str], dict[str, str]]:
    """The lines of these, as ``read`` returns them."""
    built = {outcome.model_type: row(outcome) for outcome in found if not outcome.not_built}
    return built, {outcome.model_type: row(outcome) for outcome in found if outcome.not_built}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="examine these model types only, and put their lines into the page")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    found = outcomes(arguments.types or tiny.model_types(), arguments.jobs, print)
    built, missing = lines_of(found)
    if arguments.types:
        print(*built.values(), *missing.values(), sep="\n")
        kept = [{name: line for name, line in part.items() if name not in arguments.types} for part in read()]
        built, missing = kept[0] | built, kept[1] | missing
    PAGE.write_text(page(built, missing), encoding="utf-8")
    wrong = [name for name, line in built.items() if "WRONG" in answers(line).values()]
    print(f"{PAGE.relative_to(ROOT)}: {len(built)} built; silently wrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
