"""The arrows: a room imports only from itself and the rooms before it, without a circle inside, and the core needs torch alone.

The imports are read by grimp, wherever in a file they stand; no module is run.
"""

import copy
import runpy
import subprocess
import sys
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

grimp = pytest.importorskip("grimp")

ROOT = Path(__file__).resolve().parents[1]
# The rooms of the picture in the README, from the ground up: a room may import from itself and from those before it.
ROOMS = [name for name, _, _ in runpy.run_path(str(ROOT / "docs" / "draw_design.py"))["ROOMS"]]
# Package to the rooms that may import it.
RESTRICTED = {
    "transformers": {"hf", "peft", "lab", "cli"},
    "tokenizers": {"hf", "cli"},
    "huggingface_hub": {"files", "hf", "peft", "cli"},
    "minilora_kernels": {"linear"},
    "triton": set(),
    "peft": {"hf", "proof"},  # to run beside it in a bench, in a process of its own, and to be verified
    "bitsandbytes": {"hf", "training"},  # its optimizers, where a run asks for them
    "accelerate": set(),
    "matplotlib": {"report"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "xllamacpp": {"proof"},
}


@pytest.fixture(scope="module")
def built():
    return grimp.build_graph("minilora", "minilora_kernels", include_external_packages=True, cache_dir=None)


@pytest.fixture
def graph(built):
    """The imports as they are; a test may add to them."""
    return copy.deepcopy(built)


def room(module):
    return module.split(".")[1] if "." in module else module


def is_in(package, module):
    return f"{module}.".startswith(f"{package}.")


def says(graph, importer, imported):
    lines = [str(found["line_number"]) for found in graph.get_import_details(importer=importer, imported=imported)]
    return f"{importer}, line {' and '.join(lines)}, imports {imported}"


def against_the_order(graph):
    """Every import, direct or through others, of a room that stands later."""
    layers = [name for name in reversed(ROOMS) if f"minilora.{name}" in graph.modules]
    for found in graph.find_illegal_dependencies_for_layers(layers=layers, containers={"minilora"}):
        for route in found.routes:
            chain = [sorted(route.heads)[0], *route.middle, sorted(route.tails)[0]]
            yield "; ".join(says(graph, *arrow) for arrow in pairwise(chain))


def of_a_foreign_package(graph):
    """Every import of a package by a room that must not know it."""
    allowed = {
        name: rooms for package, rooms in RESTRICTED.items() for name in graph.modules if is_in(package, name)
    } | {"minilora": {"hf", "peft", "cli"}}  # the package names what lies in every room
    for name, rooms in sorted(allowed.items()):
        for importer in sorted(graph.find_modules_that_directly_import(name)):
            if is_in("minilora", importer) and room(importer) not in rooms:
                yield says(graph, importer, name)


def circles(graph):
    """An import of every ring inside a room: of files, or of folders that import each other's files."""
    for package in sorted(name for name in graph.modules if not graph.is_module_squashed(name)):
        for arrow in sorted(graph.nominate_cycle_breakers(package)):
            yield says(graph, *arrow)


def faults(graph):
    return [*against_the_order(graph), *of_a_foreign_package(graph), *circles(graph)]


def test_every_module_has_a_room(graph):
    found = {room(name) for name in graph.find_children("minilora")}
    assert found - {"__main__"} == set(ROOMS), "add it to ROOMS in docs/draw_design.py, after all that it imports"


def test_arrows(graph):
    assert faults(graph) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("quant.blockwise", "minilora.linear.ops"),
        ("linear.layers", "minilora.lora.inject"),
        ("linear.fused", "minilora.store.load"),
        ("many.combine", "minilora"),  # `from minilora import merge`
        ("report.page", "minilora.hf.load"),
        ("errors", "minilora.files.disk"),
        ("data.batches", "minilora.training.loop"),
        ("lora.layer", "minilora.lora.variants.dora"),
        ("training.loop", "transformers"),
        ("training.loop", "matplotlib"),
        ("linear.ops", "triton"),
        ("lora.layer", "minilora_kernels.linear"),
        ("store.load", "peft"),
        ("hf.load", "accelerate"),
        ("lab.byte_model.texts", "minilora.cli.train"),
        ("lab.byte_model.model", "tokenizers"),
    ],
)
def test_a_wrong_arrow_is_seen(graph, importer, imported):
    if imported not in graph.modules:
        graph.add_module(imported, is_squashed=True)
    graph.add_import(importer=f"minilora.{importer}", imported=imported, line_number=7, line_contents="")
    assert any(f"minilora.{importer}, line 7, imports {imported}" in fault for fault in faults(graph)), faults(graph)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("linear.layers", "minilora.quant.quantized"),
        ("linear.cuda", "minilora_kernels.linear"),
        ("peft.peft_model", "minilora.many.hotswap"),
        ("hf.load", "transformers"),
        ("hf.load", "minilora"),
        ("lab.byte_model.model", "transformers"),
    ],
)
def test_a_right_arrow_passes(graph, importer, imported):
    graph.add_import(importer=f"minilora.{importer}", imported=imported, line_number=7, line_contents="")
    assert faults(graph) == []


def test_kernels_is_no_package():
    """A top-level name ``kernels`` would hide the package of that name which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_torch_and_triton_only(graph):
    kernels = [name for name in graph.modules if name.startswith("minilora_kernels")]
    found = {used.split(".")[0] for name in kernels for used in graph.find_modules_directly_imported_by(name)}
    assert len(kernels) > 5 and found - sys.stdlib_module_names == {"torch", "triton", "minilora_kernels"}


def test_lint_needs_no_optional_package(graph):
    """What mypy looks for is what lint installs: every other package that minilora imports is named in mypy's exceptions."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    excepted = {name.removesuffix(".*") for name in settings["tool"]["mypy"]["overrides"][0]["module"]}
    used = {used.split(".")[0] for name in graph.modules for used in graph.find_modules_directly_imported_by(name)}
    core = {"torch", "numpy", "safetensors", "minilora"}
    assert used - sys.stdlib_module_names - core <= excepted, "add it to [[tool.mypy.overrides]] in pyproject.toml"


TRAINS_ALONE = """
    import sys

    optional = ("transformers", "tokenizers", "huggingface_hub", "triton", "peft", "bitsandbytes", "rich", "scipy",
                "matplotlib", "datasets", "pyarrow")
    for name in (*optional, "minilora_kernels"):
        sys.modules[name] = None  # importing it raises ImportError

    import torch
    import minilora
    import minilora.linear.cuda  # imports the kernels when one is called, not before

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
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
