"""What else happens to a model with experts: transformers' implementations, checkpointing, compiling, dtypes, copies, pickles."""

import copy
import pickle
import warnings

import pytest

pytest.importorskip("transformers")

import torch

import minilora
from minilora.linear.experts.known import known_experts
from minilora.lora.coverage import coverage, experts_left
from minilora.many.adapted import disabled
from tests.architectures import batches, checks, tiny

# By transformers' interface, transposed with biases, and by a forward of minilora's.
TYPES = ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"]
CONFIG = minilora.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")


@pytest.fixture(scope="module", params=TYPES)
def bare(request):
    return tiny.build(request.param)


def adapted(bare):
    return checks.randomize(minilora.inject(copy.deepcopy(bare), CONFIG))


def homes(model):
    return [module for module in model.modules() if known_experts(module) is not None]


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_any_implementation_before_and_after(bare, name):
    batch = batches.batch_for(bare)
    wanted = checks.call(adapted(bare), batch)
    before = copy.deepcopy(bare)
    if not before._can_set_experts_implementation():
        pytest.skip("the class has one way")
    before.set_experts_implementation(name)
    plain = checks.call(before, batch)
    checks.randomize(minilora.inject(before, CONFIG))
    after = adapted(bare)
    after.set_experts_implementation(name)
    for model in (before, after):
        checks.equal(checks.call(model, batch), wanted, 1e-5, name)
        minilora.unload(model)
        own = [module.config._experts_implementation for module in homes(model) if hasattr(module, "config")]
        assert own == [name] * len(own)
        assert checks.far(checks.call(model, batch), plain) == 0


def loss_and_gradients(model, batch):
    batch = {**batch, "labels": batch["input_ids"]}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(bare, reentrant):
    batch = batches.batch_for(bare)
    plain, saving = adapted(bare).train(), adapted(bare).train()
    if not saving.supports_gradient_checkpointing:
        pytest.skip("the model has none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 6 has another name
        saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    (loss, grads), (other, others) = loss_and_gradients(plain, batch), loss_and_gradients(saving, batch)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    assert grads.keys() == others.keys()
    checks.equal([others[name] for name in grads], list(grads.values()), 1e-5, "checkpointing")


def block_of(model):
    """The first mixture of a model: a router and its experts."""
    found = next(path for path, module in model.named_modules() if known_experts(module) is not None)
    return model.get_submodule(found.rpartition(".")[0])


def first(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_it_computes_the_same_by_graphs_that_are_made_once(bare, packed):
    model = minilora.quantize_model(copy.deepcopy(bare)) if packed else copy.deepcopy(bare)
    block = block_of(checks.randomize(minilora.inject(model, CONFIG)))
    batches_ = [batches.draw(2, 9, 64, seed=seed) for seed in range(4)]
    wanted = [first(block(x)) for x in batches_]
    wanted[0].square().sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    block.zero_grad()
    torch._dynamo.reset()
    compiled, made = torch.compile(block, backend="eager"), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own tracing
        for x, want in zip(batches_, wanted, strict=True):  # each sends other tokens to other experts
            found = first(compiled(x))
            checks.equal([found], [want], 1e-5, "outputs")
            made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        first(compiled(batches_[0])).square().sum().backward()
    assert made[0] == made[-1]
    others = {name.removeprefix("_orig_mod."): p.grad for name, p in compiled.named_parameters() if p.requires_grad}
    assert any(grad is not None and grad.any() for grad in grads.values()) and grads.keys() == others.keys()
    checks.equal(
        *([grads_[name] for name in grads if grads[name] is not None] for grads_ in (others, grads)), 1e-4, "gradients"
    )


def test_a_base_in_bf16_has_adapters_in_fp32(bare):
    batch = batches.batch_for(bare)
    model = minilora.inject(copy.deepcopy(bare).to(torch.bfloat16), CONFIG)
    checks.randomize(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    dense = checks.with_updates(copy.deepcopy(bare).to(torch.bfloat16).float(), checks.updates_of(model))
    loss, grads = loss_and_gradients(model, batch)
    wanted = dense(**{**batch, "labels": batch["input_ids"]}).loss
    assert abs(loss - wanted) < 0.05 * wanted
    assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())


def test_a_copy_and_a_pickle_stand_on_their_own(bare):
    batch = batches.batch_for(bare)
    model = adapted(bare)
    wanted, plain = checks.call(model, batch), checks.call(bare, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert checks.far(checks.call(twin, batch), wanted) == 0
        mine = {p.data_ptr() for p in model.parameters()}
        assert not mine & {p.data_ptr() for p in twin.parameters() if p.numel()}
        with torch.no_grad():
            for adapter in checks.adapters(twin).values():
                adapter.lora_B.zero_()
        checks.equal(checks.call(twin, batch), plain, 2e-6, "a copy without an update")
        minilora.unload(twin)
        assert checks.far(checks.call(twin, batch), plain) == 0
        assert all("forward" not in vars(home) for home in homes(twin))
        configs = {id(module.config) for module in twin.modules() if hasattr(module, "config")}
        assert all(id(home.config) in configs and not hasattr(home.config, "_minilora_before") for home in homes(twin)
                   if hasattr(home, "config"))  # fmt: skip
        assert checks.far(checks.call(model, batch), wanted) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_another_dtype(bare, dtype):
    batch = batches.batch_for(bare)
    model = adapted(bare).to(dtype)
    for home in homes(model):
        assert {p.dtype for p in home.parameters() if not p.requires_grad} == {dtype}
    dense = checks.with_updates(copy.deepcopy(bare), checks.updates_of(adapted(bare)))
    close = 0.2 if dtype == torch.bfloat16 else 1e-5
    got, want = checks.call(model, batch)[0], checks.call(dense, batch)[0]
    assert got.isfinite().all() and abs(got - want) < close * want.abs()
    minilora.unload(model)
    assert {p.dtype for home in homes(model) for p in home.parameters()} == {dtype}


def test_experts_that_nothing_adapts_are_told(bare):
    some = minilora.LoraConfig(
        r=4, lora_alpha=6, target_modules=["o_proj" if bare.config.model_type != "jetmoe" else "kv_proj"]
    )
    model = minilora.inject(copy.deepcopy(bare), some)
    covered, others = coverage(model)
    left = experts_left(model)
    assert left and set(left) <= set(others) and len({*covered, *others}) == len(covered) + len(others)
    assert not experts_left(adapted(bare)) and set(left) <= set(coverage(adapted(bare))[0])
    with disabled(model):
        assert experts_left(model) == left
