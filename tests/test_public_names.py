"""The public names: imported when they are asked for, known to mypy, and with every variant registered whoever asks."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora
import minilora.hf
import minilora.lab
import minilora.lab.byte_model
import minilora.peft.tuners.lora
import minilora.peft.utils
import minilora.proof
from minilora import LoraConfig, inject, save_adapter
from minilora.lazy import lazy_names
from minilora.lora.adapter import VARIANTS

ROOT = Path(minilora.__file__).parents[1]
PACKAGES = [
    minilora,
    minilora.hf,
    minilora.lab,
    minilora.lab.byte_model,
    minilora.peft,
    minilora.peft.utils,
    minilora.peft.tuners,
    minilora.peft.tuners.lora,
    minilora.proof,
]


def child(source, *words):
    """What a fresh interpreter prints; a warning is an error in it."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_stub(package):
    """``{name: module}`` of the stub beside a package's ``__init__``."""
    tree = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        assert all(alias.name == alias.asname for alias in node.names), "without 'as' a name of a stub is not public"
    return {alias.name: node.module for node in imports for alias in node.names}


def in_init(package):
    """``{name: module}`` of the table in a package's ``__init__``."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (table,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    modules = ast.literal_eval(table)
    return {name: module for module, names in modules.items() for name in names}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_stub_has_the_same_names(package):
    assert in_stub(package) == in_init(package)
    assert sorted(in_init(package)) == package.__all__


@pytest.mark.parametrize(
    ("package", "name", "module"),
    [(package, name, module) for package in PACKAGES for name, module in in_init(package).items()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_name_is_what_its_module_defines(package, name, module):
    if module.startswith("minilora.hf"):
        pytest.importorskip("transformers")
    assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert name in dir(package) and package.__dict__[name] is getattr(package, name)


def test_an_import_costs_nothing_before_a_name_is_asked_for():
    printed = child("""
        import sys
        import minilora, minilora.hf
        from minilora import LoraConfig, MiniLoraError, QuantConfig, errors
        LoraConfig(r=4, lora_alpha=8), QuantConfig("nf4")
        assert not {"torch", "numpy", "transformers"} & set(sys.modules), "a config needs no torch"
        assert minilora.files.validate and minilora.errors is errors and "inject" in dir(minilora)
        from minilora import *
        print("torch" in sys.modules, "transformers" in sys.modules, quantize.__module__)
    """)
    assert printed == "True False minilora.quant.blockwise\n"


@pytest.mark.parametrize("name", ["Inject", "_private", "__wrapped__", "lora_", "hf.load"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'minilora' has no attribute '{name}'") as caught:
        getattr(minilora, name)
    assert caught.value.name == name and caught.value.obj is minilora  # from which Python says "Did you mean"
    with pytest.raises(ImportError, match="cannot import name"):
        exec(f"from minilora import {name.partition('.')[0].replace('hf', 'hf_')}")


def test_a_name_is_looked_up_once(monkeypatch):
    package = type(sys)("package_of_this_test")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    package.__getattr__, package.__dir__, package.__all__ = lazy_names(package.__name__, {"math": ("pi", "e")})
    assert package.__all__ == ["e", "pi"] and {"e", "pi", "__name__"} <= set(dir(package))
    assert package.pi == 3.141592653589793 and vars(package)["pi"] == package.pi and "e" not in vars(package)


# ---- variants are there, whichever door one comes in by

KINDS = [
    "alora",
    "corda",
    "dora",
    "loftq",
    "lora",
    "lora_fa",
    "lora_ga",
    "lora_xs",
    "mica",
    "olora",
    "orthogonal",
    "pissa",
    "vera",
]
FIELDS = {
    "alora": {"alora_invocation_tokens": [3]},
    "dora": {"use_dora": True},
    **{name: {"init_lora_weights": name} for name in ("loftq", "mica", "olora", "orthogonal", "pissa")},
}
FROM_DATA = ("corda", "lora_ga")  # cannot be injected without it: tests/lora/test_starts.py
START = [name for name in KINDS if name not in FROM_DATA]
MODEL = "torch.manual_seed(0); model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 6))"


def test_no_variant_is_forgotten_here():
    assert sorted(name for name, kind in VARIANTS.items() if kind.__module__.startswith("minilora.")) == KINDS


@pytest.mark.parametrize(
    ("module", "inject"),
    [("minilora", "inject"), ("minilora.lora.inject", "inject"), ("minilora.peft.peft_model", "get_peft_model")],
)
def test_every_variant_can_be_injected(module, inject):
    printed = child(f"""
        import {module} as room
        import torch
        from minilora.lora.config import LoraConfig
        for name in {START}:
            {MODEL}
            config = LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"], **{FIELDS}.get(name, dict()))
            room.{inject}(model, config, variant=name)
            print(type(model._minilora_adapters.slots["0"].kept["default"]).__name__)
    """)
    assert printed.split() == [VARIANTS[name].__name__ for name in START]


@pytest.mark.parametrize(
    ("module", "load"),
    [("minilora.store.load", "load_adapter"), ("minilora.peft.peft_model", "PeftModel.from_pretrained")],
)
def test_every_variant_can_be_loaded(tmp_path, module, load):
    for name in START:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6))
        config = LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"], **FIELDS.get(name, {}))
        save_adapter(inject(model, config, variant=name), tmp_path / name)
    source = f"""
        import sys
        import {module} as room
        import torch
        for name in {START}:
            {MODEL}
            room.{load}(model, sys.argv[1] + "/" + name)
            print(type(model._minilora_adapters.slots["0"].kept["default"]).__name__)
    """
    assert child(source, str(tmp_path)).split() == [VARIANTS[name].__name__ for name in START]


def test_a_variant_of_your_own_cannot_take_a_name_of_ours():
    """``register`` comes with all variants, so a name is refused where it is taken and not at the first ``inject``."""
    printed = child("""
        from minilora import LoRALinear, register
        from minilora.errors import ConfigError
        try:
            @register("vera")
            class Mine(LoRALinear):
                pass
        except ConfigError as error:
            print(error)
    """)
    assert printed == "variant name 'vera' is taken by VeRALinear; register yours under another name\n"


def test_the_quantizer_is_known_to_transformers_once_its_config_is():
    pytest.importorskip("transformers")
    printed = child("""
        from minilora.hf import NF4Config
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        print(NF4Config().quant_method in AUTO_QUANTIZER_MAPPING)
    """)
    assert printed == "True\n"
