"""The arrows: a module imports only modules that stand before it or beside it, and the core needs torch alone."""

import ast
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minilora"

# The rows of the picture in the README, from top to bottom: a module may import from its own row and from those before it.
ORDER = runpy.run_path(str(PACKAGE.parent / "docs" / "draw_design.py"))["ORDER"]
# Of each module the number of its row; a folder counts as one module.
RANKS = {name: rank for rank, (_, modules) in enumerate(ORDER) for name in modules}
RANKS |= {"__init__": RANKS["train"], "__main__": RANKS["cli"]}

KNOW_TRANSFORMERS = {"hf", "demo", "cli", "__main__"}
# Package to the modules that may import it, wherever in the file.
RESTRICTED = {
    "transformers": KNOW_TRANSFORMERS,
    "tokenizers": KNOW_TRANSFORMERS,
    "huggingface_hub": KNOW_TRANSFORMERS,
    "minilora_kernels": {"cuda"},
    "triton": set(),
    "peft": set(),
    "bitsandbytes": set(),
    "accelerate": set(),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path):
    """The module that a file belongs to: its own name, or that of its folder."""
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
    is_module = rest and ((PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").exists())
    return rest[0] if is_module else "__init__"


def faults(name, source):
    """What is wrong with the imports of module ``name``."""
    for target, line in imported(ast.parse(source)):
        top = target.split(".")[0]
        if name not in RESTRICTED.get(top, {name}):
            yield f"line {line}: {name} must not import {top}"
        limit = RANKS["hf"] if name == "__init__" else RANKS[name]  # the package names one class of hf, lazily
        if top == "minilora" and RANKS.get(own_module(target), 99) > limit:
            yield f"line {line}: {name} imports {own_module(target)}, which does not stand before it in docs/draw_design.py"


def test_the_package_is_found():
    assert {"lora", "quantize", "checkpoint"} <= {owner(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    name = owner(path)
    assert name in RANKS, (
        f"minilora/{name} is new: add it to docs/draw_design.py in test_layering.py, after all that it imports"
    )
    assert list(faults(name, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("quantize", "from minilora.ops import quant_linear", "quantize imports ops"),
        ("lora", "import minilora.inject", "lora imports inject"),
        ("layers", "def f():\n    from minilora import checkpoint", "line 2: layers imports checkpoint"),
        ("adapted", "from minilora import merge", "adapted imports __init__"),
        ("train", "try:\n    import transformers\nexcept ImportError:\n    pass", "train must not import transformers"),
        ("ops", "def f():\n    import triton.language as tl", "ops must not import triton"),
        ("layers", "from minilora_kernels.linear import forward", "layers must not import minilora_kernels"),
        ("ops", "def f():\n    import minilora_kernels", "ops must not import minilora_kernels"),
        ("hf", "from peft import LoraConfig", "hf must not import peft"),
        ("report", "from minilora.hf.load import load_model", "report imports hf"),
    ],
)
def test_a_wrong_arrow_is_seen(name, source, words):
    assert any(words in fault for fault in faults(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cuda", "from minilora.quantize import decode_range\ndef f():\n    import minilora_kernels"),
        ("ops", "from minilora import cuda"),
        ("peft_model", "from minilora import adapted, checkpoint"),
        ("codebooks", "from minilora.config import QuantConfig"),
        ("hf", "import transformers\nfrom minilora import LoraConfig"),
    ],
)
def test_a_right_arrow_passes(name, source):
    assert list(faults(name, source)) == []


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
    tree = ast.parse((PACKAGE / "cuda.py").read_text(encoding="utf-8"))
    assert "minilora_kernels" not in {name for node in tree.body for name in imported_here(node)}


def imported_here(node):
    """Names that one statement at the top of a file imports."""
    return {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()


TRAINS_ALONE = """
    import sys

    for name in ("transformers", "tokenizers", "huggingface_hub", "triton", "peft", "bitsandbytes", "rich", "scipy"):
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
