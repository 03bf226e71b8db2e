"""A pytest plugin: PEFT's tests with PEFT's LoRA and VeRA names answered by minilora. ``run.py`` starts pytest with it.

The tests import peft itself, which must be installed: their parameters name many methods that are not LoRA. So each name that
``minilora.peft`` has replaces PEFT's at the same place, and each other name of PEFT's LoRA modules becomes a class that raises when it is
used. PEFT's own models cannot be built, so nothing can pass on PEFT's code. ``SUITE_WITH=peft`` leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
from pathlib import Path

import peft
import pytest

WITH, OUT, ROOT = os.environ["SUITE_WITH"], Path(os.environ["SUITE_OUT"]), Path(os.environ["SUITE_ROOT"])
ONLY = os.environ.get("SUITE_ONLY")
# Modules of PEFT of which every class and function is LoRA's, or what LoRA stands on.
LORAS = (
    "peft.tuners.lora",
    "peft.tuners.vera",
    "peft.tuners.tuners_utils",
    "peft.optimizers",
    "peft.helpers",
    "peft.utils.hotswap",
)
REAL_LORA, REAL_VERA, REAL_CONFIG = peft.LoraConfig, peft.VeraConfig, peft.PeftConfig  # before anything is replaced
COLLECTING = True


class MissingInMinilora(Exception):
    """A name of PEFT's that minilora does not have was used."""


class _Missing(type):
    """What stands for a name that is missing: it may be named in parameters, and raises when it is used."""

    def __call__(cls, *args, **kwargs):
        if COLLECTING:
            return cls
        raise MissingInMinilora(cls.__name__)

    def __instancecheck__(cls, thing):
        raise MissingInMinilora(cls.__name__)

    def __getattr__(cls, name):
        if name.startswith("__") or name in ("pytestmark", "_pytestfixturefunction", "setUpModule"):
            raise AttributeError(name)
        if COLLECTING:
            return missing(f"{cls.__name__}.{name}")
        raise MissingInMinilora(f"{cls.__name__}.{name}")


def missing(name):
    return _Missing(name, (), {})


def _cannot_be_built(self, *args, **kwargs):
    raise AssertionError(f"PEFT's own {type(self).__name__} was built")


def answer():
    """Put minilora's names into PEFT's modules."""
    import minilora.peft
    from minilora.peft.others import OTHERS

    peft.PeftModel.__init__ = peft.tuners.tuners_utils.BaseTuner.__init__ = _cannot_be_built
    for found in pkgutil.walk_packages(peft.__path__, "peft."):
        if (
            found.name.startswith(("peft.tuners.", "peft.utils."))
            and "lora" not in found.name
            and "utils" not in found.name
        ):
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "peft":
            continue
        try:
            own = importlib.import_module(f"minilora.{name}")
        except ImportError:
            own = None
        for each in [each for each in vars(module) if not each.startswith("__")]:
            source = own if own is not None and hasattr(own, each) else minilora.peft
            if each in OTHERS and not each.startswith("Lora"):
                continue
            if hasattr(source, each):
                with contextlib.suppress(Exception):
                    setattr(module, each, getattr(source, each))
            elif name.startswith(LORAS) and _is_defined_in(vars(module)[each], module):
                setattr(module, each, missing(each))


def _is_defined_in(thing, module):
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__


# ---- which tests are LoRA's


@functools.cache
def source_of(function):
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def configs_in(value, depth=0):
    """ "lora", "vera" and "other" for the configs in a parameter."""
    if isinstance(value, functools.partial):
        value = value.func
    if value is peft.LoraConfig or type(value) is peft.LoraConfig or value is REAL_LORA:
        yield "lora"
    elif value is peft.VeraConfig or type(value) is peft.VeraConfig or value is REAL_VERA:
        yield "vera"
    elif isinstance(value, REAL_CONFIG) or (inspect.isclass(value) and issubclass(value, REAL_CONFIG)):
        yield "other"
    elif isinstance(value, (list, tuple, dict)) and depth < 3:
        for each in value.values() if isinstance(value, dict) else value:
            yield from configs_in(each, depth + 1)


def is_loras(item):
    """Whether a test is about LoRA or VeRA, and about no other method."""
    found = set(configs_in(list(getattr(getattr(item, "callspec", None), "params", {}).values())))
    if found:
        return "other" not in found
    own = source_of(item.function)
    fixtures = "".join(
        source_of(each.func)
        for defs in item._fixtureinfo.name2fixturedefs.values()
        for each in defs
        if _is_theirs(each.func)
    )
    text = own + fixtures
    others = {name for name in re.findall(r"\b(\w+Config)\(", text) if _is_other(name)}
    return bool(re.search(r"lora|\bvera", f"{item.name} {text}", re.I)) and not others


def _is_other(name):
    kind = getattr(peft, name, None)
    return inspect.isclass(kind) and kind not in (peft.LoraConfig, peft.VeraConfig) and issubclass(kind, REAL_CONFIG)


def _is_theirs(function):
    return str(ROOT) in getattr(getattr(function, "__code__", None), "co_filename", "")


FEATURES = {
    "convolutions": r"conv[123]d(?!1)|conv3d|resnet|ModelConv1D",
    "nn.MultiheadAttention": r"\bmha|multiheadattention",
    "target_parameters": r"target_parameter|paramwrapper|usingparameters|\bmoe",
    "aLoRA": r"alora",
    "Arrow": r"arrow",
    "BD-LoRA": r"bd-?lora|blockdiagonal",
    "CorDA": r"corda",
    "EVA": r"\beva\b|_eva|eva_|evaconfig",
    "LoRA-GA": r"lora_?ga\b|loraga",
    "VeLoRA": r"velora",
    "KaSA": r"kasa",
    "MonteCLoRA": r"monteclora",
    "MiCA": r"mica\b",
    "VeRA": r"\bvera",
    "QA-LoRA": r"qalora",
    "Megatron": r"megatron",
    "layer replication": r"replicat",
    "mixed models": r"mixed_model|peftmixedmodel|xlora",
}


def features_of(item):
    """What a test is about beside plain LoRA on linear layers and embeddings."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    text = " ".join([item.name, getattr(item.cls, "__name__", ""), item.path.name, *map(repr, params.values())])
    found = set(configs_in(list(params.values())))
    if not found & {"lora", "vera"}:
        text += source_of(item.function)
    elif "vera" in found:
        text += " vera"
    return [name for name, pattern in FEATURES.items() if re.search(pattern, text, re.I)]


def name_of(item):
    """The test's file and name, whatever folder pytest was started in."""
    return f"{item.path.name}::{item.nodeid.partition('::')[2]}"


# ---- what pytest calls


@contextlib.contextmanager
def _offline(model_id):
    yield


def pytest_configure(config):
    sys.path.insert(0, str(ROOT))
    if WITH == "minilora":
        answer()
    import tests.testing_utils

    tests.testing_utils.hub_online_once = _offline
    OUT.write_text("")


def pytest_collection_modifyitems(config, items):
    only = set(Path(ONLY).read_text().splitlines()) if ONLY else None
    kept = [item for item in items if is_loras(item) and (only is None or name_of(item) in only)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_collection_finish(session):
    global COLLECTING
    COLLECTING = False


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "call" and report.passed:
        return
    said = {"id": name_of(item), "file": item.path.name, "outcome": report.outcome, "features": features_of(item)}
    if call.excinfo is not None:
        said["error"] = f"{call.excinfo.type.__name__}: {str(call.excinfo.value)[:500]}"
        lines = [entry for entry in call.excinfo.traceback if str(ROOT) in str(entry.path)]
        said["line"] = str(lines[-1].statement).strip()[:200] if lines else ""
    with OUT.open("a") as file:
        file.write(json.dumps(said) + "\n")
