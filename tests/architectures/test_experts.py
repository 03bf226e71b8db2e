"""Experts of every class of the installed transformers: adapted, packed, merged, saved and read by PEFT as linear layers are.

A part that has all kinds of experts in it runs by default, the whole with ``make test-all``.
"""

import re
import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from torch import nn

import minilora
from minilora.linear.experts.known import BY_NAME, known_experts
from minilora.linear.experts.layers import QuantExperts, is_experts
from minilora.linear.experts.routers import routers_among
from minilora.linear.layers import is_router
from minilora.lora.bare import Bare
from minilora.lora.coverage import coverage, experts_left, linear_weights
from minilora.lora.match import linear_paths
from tests.architectures import checks, experts, tiny

# One of each kind: usual, transposed, with biases, interleaved, without a gate, a norm behind, shapes of their own, routers of all kinds.
FAST = [
    "AfmoeExperts", "AriaExperts", "DbrxExperts", "DeepseekV4Experts", "GptOssExperts", "InklingSharedExperts", "JetMoeParallelExperts",
    "Llama4TextExperts", "LongcatFlashExperts", "MuseSparkExperts", "NemotronHExperts", "PhimoeExperts", "Qwen3MoeExperts",
    "Step3p7Experts", "ZayaExperts",
]  # fmt: skip
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in experts.CLASSES]
# What minilora refuses by name in some of these models; everything else is right, or PEFT's fault.
REFUSED = {"alive": "got no gradient from this batch", "merge": "shares its weight with"}
# Parameters of three sizes that are no experts: ``all-linear`` leaves them out and ``coverage`` counts them among the others.
NO_EXPERTS = {
    "CsmCodebooksHead", "DeepseekV4HCACompressor", "EsmFold2ConfidenceHead", "FunnelRelMultiheadAttention", "Gemma4UnifiedVisionEmbedder",
    "Gemma4VisionPatchEmbedder", "GroupedLinearLayer", "Kimi_K25VisionPositionEmbeddings", "KyutaiSpeechToTextFlexibleLinear",
    "MoshiFlexibleLinear", "RecurrentGemmaRglru", "ZambaMambaMixer",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:PEFT 0.21 does not load:UserWarning")


def test_every_class_is_examined():
    assert sorted(experts.decorated() + experts.of_own_shape()) == experts.CLASSES
    assert set(FAST) | set(BY_NAME) <= set(experts.CLASSES)


def test_every_other_class_with_such_a_parameter_is_known():
    held = {name for name, sizes in experts.three_dimensional().items() if not re.match(r"\[?1,|.*dtype|.*, 1$", sizes)}
    assert held - set(experts.CLASSES) - NO_EXPERTS == set()


@pytest.mark.slow
def test_no_such_parameter_of_any_architecture_is_passed_over():
    """Of every model type that can be made without memory: it is a projection of experts, or ``coverage`` tells of it."""
    seen = set()
    for model_type in tiny.model_types():
        try:
            config = tiny.tiny_config(model_type)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = tiny.model_class(config)(config)
        except Exception:  # docs/architectures.md says why
            continue
        told = set(linear_weights(Bare(model)))
        for path, module in model.named_modules():
            held = {
                key: weight for key, weight in module._parameters.items() if weight is not None and weight.dim() == 3
            }
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)):
                continue
            missing = {key for key, weight in held.items() if min(weight.shape) > 1 and f"{path}.{key}" not in told}
            assert not missing, (model_type, path, missing)
            if held and "Experts" in type(module).__name__:
                assert known_experts(module) is not None, (model_type, path)
                seen.add(type(module).__name__)
    assert len(seen) > 60


@pytest.fixture(scope="module")
def trials():
    """A trial of one class at a time: a model is made once for all that is asked of it."""
    kept = {}

    def made(name):
        if name not in kept:
            kept.clear()
            model = experts.build(name)
            kept[name] = checks.begin_with(model, experts.batch_for(model))
        return kept[name]

    return made


@pytest.mark.parametrize("name", EVERY)
def test_right_or_refused_by_name(name, trials):
    trial, refused = trials(name), {}
    for asked, check in checks.CHECKS.items():
        try:
            check(trial)
        except minilora.MiniLoraError as error:
            refused[asked] = str(error)
        except checks.PeftFault as fault:
            refused[asked] = f"PEFT: {fault}"
    assert not {asked: why for asked, why in refused.items() if REFUSED.get(asked, "PEFT: ") not in why}


@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_that_is_nothing_changes_nothing_and_leaves_no_trace(name, trials):
    trial = trials(name)
    model = trial.copy()
    before, state = checks.call(model, trial.batch), model.state_dict()
    named = [key for key, _ in model.named_parameters()]
    own = [module for module in model.modules() if known_experts(module) is not None]
    configs = [vars(module).get("config") for module in own]
    minilora.inject(model, trial.config)
    assert checks.far(checks.call(model, trial.batch), before) < 2e-6
    minilora.unload(model)
    after = model.state_dict()
    assert list(after) == list(state) and [key for key, _ in model.named_parameters()] == named
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert all("forward" not in vars(module) for module in own)
    assert all(vars(module).get("config") is config for module, config in zip(own, configs, strict=True))
    assert checks.far(checks.call(model, trial.batch), before) == 0


@pytest.mark.parametrize("name", EVERY)
def test_all_linear_has_every_projection_and_no_router(name, trials):
    trial = trials(name)
    bare = Bare(trial.bare)
    found, modules = linear_paths(trial.bare), dict(bare.named_modules())
    places = [f"{path}.{name}" if path else name for path, module in trial.bare.named_modules()
              for name, weight in module._parameters.items()
              if weight is not None and weight.dim() == 3 and not isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding))]  # fmt: skip
    adapted, left = coverage(trial.adapted)
    unreached = set(trial.config.exclude_modules or ())
    assert set(places) <= set(found) | set(left) | {path for path in places if min(bare_shape(trial.bare, path)) == 1}
    own = [path for path, module in modules.items() if is_experts(module)]
    assert own and set(own) <= set(found) and set(own) - unreached <= set(adapted)
    routers = routers_among(modules) | {path for path, module in modules.items() if is_router(module)}
    assert routers
    assert not [path for path in (*found, *adapted) if any(f"{path}.".startswith(f"{router}.") for router in routers)]
    assert not experts_left(trial.adapted)


def bare_shape(model, path):
    return checks.weight_of(model, path).shape


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_the_experts_that_got_tokens_and_no_others(name, trials):
    trial = trials(name)
    model = trial.again().train(trial.trains)
    hit = {}
    for path, adapter in checks.adapters(model).items():
        if adapter.on == "experts":
            hit[path] = set()
            adapter.register_forward_pre_hook(
                lambda module, args, path=path: hit[path].update(expert for expert, _, _ in args[1].spans)
            )
    held = checks.adapters(model)
    parts = [part for path in hit for part in (held[path].lora_A, held[path].lora_B)]
    found = checks.gradients(model, trial.batch, parts)
    dense = checks.with_updates(trial.copy(), checks.updates_of(model), trains=True).train(trial.trains)
    weights = checks.gradients(dense, trial.batch, [checks.weight_of(dense, path) for path in hit])
    assert any(hit.values())
    for path, whole, A, B in zip(hit, weights, found[::2], found[1::2], strict=True):
        wanted = reached(whole.reshape(len(A), -1))  # not all with tokens: those of the last word do not reach a loss
        assert reached(A) == reached(B) == wanted and wanted <= hit[path], path


def reached(gradient) -> set[int]:
    return {expert for expert, part in enumerate(gradient) if part.any()}


@pytest.mark.parametrize("name", EVERY)
def test_packed_all_experts_are(name, trials):
    model = minilora.quantize_model(trials(name).copy())
    own = [path for path, module in Bare(model).named_modules() if is_experts(module)]
    assert own and all(isinstance(model.get_submodule(path), QuantExperts) for path in own)
    assert all(parameter.dim() < 3 or parameter.dtype == torch.uint8 or min(parameter.shape) == 1 or parameter.dim() > 3
               for module in model.modules() if known_experts(module) is not None for parameter in module.parameters())  # fmt: skip
