"""The arrows: a room imports only from itself and the rooms before it, without a circle inside, and the core needs torch alone."""

import ast
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minilora"

# The rooms of the picture in the README, from the ground up: a room may import from itself and from those before it.
ROOMS = runpy.run_path(str(PACKAGE.parent / "docs" / "draw_design.py"))["ROOMS"]
RANKS = {name: rank for rank, (name, _, _) in enumerate(ROOMS)}
# The package names what users need of every room, and one class of hf, lazily.
RANKS |= {"__init__": RANKS["hf"], "__main__": RANKS["cli"]}
KNOW_TRANSFORMERS = {"hf", "cli", "__main__"}
# Package to the modules that may import it, wherever in the file.
RESTRICTED = {
    "transformers": KNOW_TRANSFORMERS,
    "tokenizers": KNOW_TRANSFORMERS,
    "huggingface_hub": KNOW_TRANSFORMERS,
    "minilora_kernels": {"linear"},
    "triton": set(),
    "peft": {"hf"},  # to run beside it in a bench, in a process of its own
    "bitsandbytes": {"hf"},
    "accelerate": set(),
    "matplotlib": {"report"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path):
    """The room that a file belongs to; a module on the floor is one by itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree):
    """Full dotted names of all that a file imports, inside functions too; each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import out, from minilora..."
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_module(name):
    """Which module of minilora an imported name lies in: ``minilora.merge`` is a name of ``__init__``."""
    rest = name.split(".")[1:]
    return rest[0] if rest and rest[0] in RANKS else "__init__"


def faults(name, source):
    """What is wrong with the imports of module ``name``."""
    for target, line in imported(ast.parse(source)):
        top = target.split(".")[0]
        if name not in RESTRICTED.get(top, {name}):
            yield f"line {line}: {name} must not import {top}"
        if top == "minilora" and RANKS.get(own_module(target), 99) > RANKS[name]:
            yield f"line {line}: {name} imports {own_module(target)}, which does not stand before it in docs/draw_design.py"


def test_the_package_is_found():
    assert {"lora", "quant", "store"} <= {owner(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    name = owner(path)
    assert name in RANKS, f"minilora/{name} is new: add it to ROOMS in docs/draw_design.py, after all that it imports"
    assert list(faults(name, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("quant", "from minilora.linear.ops import quant_linear", "quant imports linear"),
        ("linear", "import minilora.lora.layer.inject", "linear imports lora"),
        ("linear", "def f():\n    from minilora.store import load", "line 2: linear imports store"),
        ("many", "from minilora import merge", "many imports __init__"),
        (
            "training",
            "try:\n    import transformers\nexcept ImportError:\n    pass",
            "training must not import transformers",
        ),
        ("linear", "def f():\n    import triton.language as tl", "linear must not import triton"),
        ("lora", "from minilora_kernels.linear import forward", "lora must not import minilora_kernels"),
        ("store", "from peft import LoraConfig", "store must not import peft"),
        ("report", "from minilora.hf.load import load_model", "report imports hf"),
        ("training", "def f():\n    import matplotlib.figure", "training must not import matplotlib"),
    ],
)
def test_a_wrong_arrow_is_seen(name, source, words):
    assert any(words in fault for fault in faults(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("linear", "from minilora.quant.quantized import decode_range\ndef f():\n    import minilora_kernels"),
        ("peft_model", "from minilora.many import adapted"),
        ("quant", "from minilora.quant.config import QuantConfig"),
        ("hf", "import transformers\nfrom minilora import LoraConfig"),
    ],
)
def test_a_right_arrow_passes(name, source):
    assert list(faults(name, source)) == []


def circle(arrows):
    """Files that import each other in a ring, from ``{file: files that it imports}``; empty where there is none."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def lies_in(target):
    """The module that an imported name lies in: ``minilora.files.write.write_file`` in ``minilora.files.write``."""
    return target if target in MODULES else target.rpartition(".")[0]


def test_no_circle_inside_a_room():
    arrows = {
        name: {lies_in(target) for target, _ in imported(ast.parse(path.read_text(encoding="utf-8")))} - {name}
        for name, path in MODULES.items()
        if name != "minilora"
    }
    assert circle(arrows) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


KERNELS = PACKAGE.parent / "kernels" / "minilora_kernels"


def test_kernels_is_no_package():
    """A top-level name ``kernels`` would hide the package of that name which transformers imports."""
    assert not (KERNELS.parent / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    names = {name.split(".")[0] for name, _ in imported(ast.parse(path.read_text(encoding="utf-8")))}
    foreign = names - sys.stdlib_module_names - {"torch", "triton", "minilora_kernels"}
    assert foreign == set()


def test_kernels_are_imported_inside_a_function():
    [path] = PACKAGE.rglob("cuda.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "minilora_kernels" not in {name for node in tree.body for name in imported_here(node)}


def imported_here(node):
    """Names that one statement at the top of a file imports."""
    return {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()


TRAINS_ALONE = """
    import sys

    for name in ("transformers", "tokenizers", "huggingface_hub", "triton", "peft", "bitsandbytes", "rich", "scipy", "matplotlib"):
        sys.modules[name] = None  # importing it raises ImportError

    import torch
    import minilora

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 5))
    minilora.quantize_model(model, target_modules=["0"])
    minilora.get_peft_model(model, minilora.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, goal = torch.randn(16, 12), torch.randn(16, 5)
    before = (model(x) - goal).square().mean()
    before.backward()
    optimizer.step()
    assert (model(x) - goal).square().mean() < before
    print("trained")
"""


def test_the_core_trains_without_any_optional_package():
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(TRAINS_ALONE)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
