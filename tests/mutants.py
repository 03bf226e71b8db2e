"""Break the code on purpose, a sign at a time, and see whether a test notices: ``make mutants``; what survives is in ``mutants.md``.

    python tests/mutants.py --modules files/validate files/parse --count 200 --seed 0

A mutant is a module with one comparison, operator, number or condition changed, or one statement left out; texts stay. First each test runs
once under coverage, so that a mutant meets the tests that execute its line, quickest first, until one fails. Tests that start
Python anew are left out: they would import the module as it is. Nothing is written; the mutant is imported in place of the file.
"""

import argparse
import ast
import copy
import gc
import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[1]
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift,
}  # fmt: skip
TESTS = {
    "files/validate": ["lora/test_config", "files/test_validate"],
    "files/parse": ["files/test_parse", "store/test_seal"],
    "files/read": ["files/test_read", "files/test_write", "files/test_power_loss"],
    "files/staging": ["files/test_write", "files/test_power_loss"],
    "files/write": ["files/test_write", "files/test_power_loss"],
    "store/adapter_files": ["store/test_load", "store/test_seal"],
    "store/fill": ["store/test_load", "store/test_seal"],
    "store/load": [
        "store/test_load",
        "store/test_seal",
        "lora/test_variants.py::test_a_calibrated_loftq_adapter_is_loaded_on_the_same_calibration_only",
    ],
    "many/adapted": ["many/test_adapted", "many/test_many"],
}
FRESH = "subprocess"  # in the source of a test: it starts Python anew


# ---- mutants


def alternatives(node):
    """``(words, node)`` of each way to break this one."""
    if isinstance(node, (ast.Compare, ast.BoolOp, ast.BinOp, ast.AugAssign)):
        signs = node.ops if isinstance(node, ast.Compare) else [node.op]
        for at, sign in enumerate(signs):
            if type(sign) in SWAPS:
                other = copy.deepcopy(node)
                if isinstance(node, ast.Compare):
                    other.ops[at] = SWAPS[type(sign)]()
                else:
                    other.op = SWAPS[type(sign)]()
                yield f"{type(sign).__name__} -> {SWAPS[type(sign)].__name__}", other
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from ((f"{node.value} -> {new}", ast.Constant(new)) for new in (node.value + 1, node.value - 1))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not left out", node.operand
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        other = copy.copy(node)
        other.test = ast.UnaryOp(ast.Not(), node.test)
        yield "condition negated", other
    elif isinstance(node, ast.comprehension) and node.ifs:
        other = copy.copy(node)
        other.ifs = []
        yield "filter left out", other
    elif (
        isinstance(node, ast.Return)
        and node.value
        and not (isinstance(node.value, ast.Constant) and not node.value.value)
    ):
        yield "returns None", ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.Raise, ast.Break, ast.Continue)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "statement left out", ast.Pass()
    if isinstance(node, (ast.Assign, ast.AugAssign)) and not isinstance(getattr(node, "targets", [node])[0], ast.Name):
        yield "statement left out", ast.Pass()


class Mutator(ast.NodeTransformer):
    """Visits all places in a fixed order and breaks the one with number ``chosen``; ``found`` has the line and the words of each."""

    def __init__(self, lines, chosen=None):
        self.lines, self.chosen, self.found = lines, chosen, []

    def visit(self, node):
        if isinstance(node, ast.JoinedStr) or "pragma: no cover" in self.lines[getattr(node, "lineno", 1) - 1]:
            return node  # texts of messages; what no test can reach
        for words, other in alternatives(node):
            self.found.append((getattr(node, "lineno", None) or node.iter.lineno, words))
            if len(self.found) - 1 == self.chosen:
                return ast.copy_location(other, node) if hasattr(node, "lineno") else other
        return self.generic_visit(node)

    def generic_visit(self, node):
        """The parts that are run: annotations are not."""
        kept = {name: getattr(node, name) for name in ("annotation", "returns") if getattr(node, name, None)}
        vars(node).update(dict.fromkeys(kept))
        super().generic_visit(node)
        vars(node).update(kept)
        return node


def mutants(path):
    source = path.read_text(encoding="utf-8")
    mutator = Mutator(source.splitlines())
    mutator.visit(ast.parse(source))
    return mutator.found


class Mutant(SourceFileLoader):
    """The loader and finder of one broken module."""

    def __init__(self, name, path, chosen):
        super().__init__(name, str(path))
        source = path.read_text(encoding="utf-8")
        tree = Mutator(source.splitlines(), chosen).visit(ast.parse(source))
        self.code = compile(ast.fix_missing_locations(tree), str(path), "exec")

    def get_code(self, fullname):
        return self.code

    def find_spec(self, fullname, path=None, target=None):
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )


# ---- tests


class Chosen:
    """A plugin of pytest: runs the tests of ``order`` in that order, or all; a test is quick if ``times`` says so."""

    def __init__(self, order=None, watch=None):
        self.order, self.watch, self.times = order, watch, {}

    def pytest_collection_modifyitems(self, items):
        if self.order is not None:
            rank = {name: at for at, name in enumerate(self.order)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])
        else:
            items[:] = [item for item in items if FRESH not in item.function.__code__.co_names]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        began = time.perf_counter()
        if self.watch:
            self.watch.switch_context(item.nodeid)
        result = yield
        self.times[item.nodeid] = time.perf_counter() - began
        return result


def in_a_fork(job, seconds):
    """What ``job()`` returns, a text, from a process of its own; None if it takes longer."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        loud, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            with os.fdopen(writer, "w") as answer:
                answer.write(job())
        except BaseException:
            os.write(loud, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return said or None


def run(files, plugin):
    paths = [str(ROOT / "tests" / (name if "::" in name else f"{name}.py")) for name in files]
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:anyio", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([*quiet, *paths], plugins=[plugin])


def survey(module, files):
    """Line to the tests that execute it, and the seconds of each test."""
    path = str(ROOT / "minilora" / f"{module}.py")

    def job():
        watch = coverage.Coverage(data_file=None, include=[path])
        watch.start()
        plugin = Chosen(watch=watch)
        code = run(files, plugin)
        watch.stop()
        lines = watch.get_data().contexts_by_lineno(path)
        return repr((int(code), lines, plugin.times))

    code, lines, times = ast.literal_eval(in_a_fork(job, 3_000))
    if code:
        raise SystemExit(f"{module}: its tests fail as it is; run them first")
    return lines, times


def meets(module, number, order):
    """A job that says what the tests do to a mutant: "killed" or "survived"."""

    def job():
        sys.meta_path.insert(
            0, Mutant("minilora." + module.replace("/", "."), ROOT / "minilora" / f"{module}.py", number)
        )
        files = dict.fromkeys(name.split("::")[0].removeprefix("tests/").removesuffix(".py") for name in order)
        return "killed" if run(files, Chosen(order)) else "survived"

    return job


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument(
        "--count", type=int, default=10_000, help="mutants of each module, drawn at random (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds of tests that a mutant may cost; the slowest are left out"
    )
    parser.add_argument("--only", type=int, nargs="+", help="these numbers, to look at survivors again")
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1"}
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    # Loaded once, here; minilora is not, so that each fork imports its own.
    import hypothesis  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a fork would go through all of torch, and copy it
    for module in chosen.modules:
        score(module, chosen)


def score(module, chosen):
    lines, times = survey(module, TESTS[module])
    if in_a_fork(meets(module, None, sorted(times, key=times.__getitem__)), 3_000) != "survived":
        raise SystemExit(f"{module}: its tests fail without a mutant when the quickest come first")
    every = mutants(ROOT / "minilora" / f"{module}.py")
    drawn = sorted(random.Random(chosen.seed).sample(range(len(every)), min(chosen.count, len(every))))
    survivors, began = [], time.monotonic()
    for number in chosen.only or drawn:
        line, words = every[number]
        names = {name for name in lines.get(line, []) if name} or set(times)
        order, cost = [], 0.0
        for name in sorted(names, key=times.__getitem__):
            cost += times[name]
            if cost > chosen.budget and order:
                break
            order.append(name)
        said = in_a_fork(meets(module, number, order), 10 + 5 * cost)
        if said == "survived":
            survivors.append(number)
            text = (ROOT / "minilora" / f"{module}.py").read_text(encoding="utf-8").splitlines()[line - 1].strip()
            print(f"  {module}.py:{line} #{number} {words}: {text}", flush=True)
    total = len(chosen.only or drawn)
    killed = total - len(survivors)
    print(
        f"{module}: {killed} of {total} mutants killed ({killed / total:.1%}; {len(every)} in all), {time.monotonic() - began:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
