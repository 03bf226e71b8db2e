"""What is asked of LoRA on one architecture: each question is answered "right", "refused: why" or, which is a fault, "WRONG: how".

What is right is computed beside minilora: the same model, dense, with ``W + s B A`` in place of ``W``.
"""

import copy
import dataclasses
import re
import tempfile
import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

import minilora
from minilora.linear.experts.layers import QuantExperts
from minilora.lora.coverage import coverage
from minilora.lora.targets import ends_with
from tests.architectures import batches, tiny

R, ALPHA = 4, 6
SCALING = ALPHA / R
CLOSE, CLOSE_TO_PEFT, CLOSE_GRADIENT = 1e-4, 1e-5, 1e-3
# These lie [E, in, out] and do not say so: PEFT takes in for out, and its A is over out.
CROSSED = ("Llama4TextExperts",)


class Wrong(AssertionError):
    """Something came out otherwise than it should, and nobody was told."""


@dataclass
class Trial:
    """One architecture: its bare model, a batch, an adapted model, and what that must compute.

    Attributes:
        config: of the adapter. dense: the model with the updates in its weights. wanted: what it computes.
        trains: the mode for gradients; eval, unless the bare model has none there (RWKV writes in place).
        refusal: what ``check_adapter`` said of layers that the loss does not depend on; the config leaves them out.
    """

    bare: nn.Module
    batch: dict
    config: minilora.LoraConfig
    adapted: nn.Module
    dense: nn.Module
    wanted: list
    covers: tuple[int, int]
    trains: bool
    refusal: str = ""

    def copy(self) -> nn.Module:
        """The bare model once more."""
        return copy.deepcopy(self.bare)

    def again(self) -> nn.Module:
        """The adapted model once more, with the same numbers."""
        return randomize(minilora.inject(self.copy(), self.config))


def call(model, batch):
    """The model's floating outputs; chance is the same each time."""
    with torch.no_grad():
        return batches.tensors(batches.outputs(model, batch))


def far(got, want) -> float:
    """The largest difference, as a part of the largest value of the tensor it is in. What is masked with huge numbers is left out."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach().double(), b.detach().double()
        here = b.isfinite() & (b.abs() < 1e6)
        if not torch.equal(here, a.isfinite() & (a.abs() < 1e6)):
            return float("inf")
        if here.any():
            worst = max(worst, float((a[here] - b[here]).abs().max() / b[here].abs().max().clamp(min=1e-3)))
    return worst


def equal(got, want, limit, what):
    """Raise ``Wrong`` if these are not within ``limit``."""
    if not (off := far(got, want)) <= limit:
        raise Wrong(f"{what}: off by {off:.0e}")


def adapters(model) -> dict:
    """Path to adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, minilora.Adapter)}


def randomize(model):
    """A and B at random, so large that the update is felt."""
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(model).values():
        with torch.no_grad():
            adapter.lora_A.copy_(
                torch.randn(adapter.lora_A.shape, generator=generator) / adapter.lora_A.shape[-1] ** 0.5
            )
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) * 0.2)
    return model


def update(a, b):
    """``s B A``, the same in any library; of experts for each."""
    return SCALING * (b.detach().double() @ a.detach().double())


def place_of(model, path):
    """``(module, name)`` of the parameter of the bare model that an adapter at ``path`` is about: a layer's weight, or experts' own."""
    owner, _, name = path.rpartition(".")
    home = model.get_submodule(owner)
    return (home, name) if name in home._parameters else (model.get_submodule(path), "weight")


def weight_of(model, path):
    """That parameter."""
    home, name = place_of(model, path)
    return home._parameters[name]


def turned(home, weight, values):
    """``[out, in]`` or ``[E, out, in]`` as the model keeps ``weight``; of square experts, which are none here, as they are."""
    if values.dim() == 3:
        fits = weight.shape[-2] == values.shape[1] or weight.shape[0] == values.shape[0] * values.shape[1]
        return (values if fits and weight.shape[-1] == values.shape[2] else values.transpose(1, 2)).reshape(
            weight.shape
        )
    return values.t() if type(home).__name__ == "Conv1D" else values


def unturned(home, weight, like):
    """The inverse: a gradient of ``weight`` as ``like [.., out, in]`` lies."""
    if like.dim() == 3:
        E, rows, columns = like.shape
        lies = turned(home, weight, torch.arange(like.numel(), dtype=torch.float64).view(like.shape)).reshape(-1).long()
        found = torch.empty(like.numel(), dtype=weight.dtype)
        found[lies] = weight.reshape(-1)
        return found.view(E, rows, columns)
    return weight.t() if type(home).__name__ == "Conv1D" else weight


def with_updates(model, updates, trains=False):
    """The model with ``W + update`` in each of these layers, as a parameter of its own."""
    for path, delta in updates.items():
        home, name = place_of(model, path)
        weight = home._parameters[name].detach()
        whole = weight.double() + turned(home, weight, delta)
        setattr(home, name, nn.Parameter(whole.to(weight.dtype), requires_grad=trains))
    return model


def updates_of(model):
    return {path: update(adapter.lora_A, adapter.lora_B) for path, adapter in adapters(model).items()}


def updates_in_peft(model):
    """The same of a model of PEFT's."""
    held = {path: module for path, module in model.named_modules() if len(getattr(module, "lora_A", ()))}
    found = {}
    for path, module in held.items():
        path, a, b = (
            path.removeprefix("base_model.model."),
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
        )
        if hasattr(module, "parameter_name"):  # one of experts: the expert counts fastest in B
            path = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            a, b = a.unflatten(0, (module.num_experts, -1)), b.unflatten(1, (-1, module.num_experts)).permute(2, 0, 1)
            if type(module.get_base_layer()).__name__ in CROSSED:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
        found[path] = update(a, b)
    return found


def same_updates(found, wanted) -> bool:
    """Whether these are the same layers with the same updates, to the bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[path], wanted[path]) for path in wanted)


def loss_of(found):
    """The model's own loss; without labels a random sum of all it returns (a square would be constant where outputs are normalized)."""
    if isinstance(own := getattr(found, "loss", None), torch.Tensor):
        return own.sum()
    generator = torch.Generator().manual_seed(7)
    # Drawn for each, so that a tensor without a gradient does not change what the others are multiplied with.
    drawn = [(t, torch.randn(t.shape, generator=generator)) for t in batches.tensors(found)]
    parts = [(t.float() * weight).mean() for t, weight in drawn if t.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def gradients(model, batch, parameters):
    """Of the loss; None where it does not depend on one. Reformer's layers write theirs into ``.grad`` while others are computed."""
    with torch.enable_grad():
        loss = loss_of(batches.outputs(model, batch))
        if not loss.requires_grad:
            return [None] * len(parameters)
        model.zero_grad()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [p.grad if gradient is None else gradient for p, gradient in zip(parameters, found, strict=True)]
        model.zero_grad()
        return found


def dead_layers(model, batch) -> list[str]:
    """Paths of adapters that get no gradient, found without the library's own check."""
    held = adapters(model)
    found = gradients(model, batch, [adapter.lora_A for adapter in held.values()])
    return [path for path, gradient in zip(held, found, strict=True) if gradient is None]


def _are_dead(dense, batch, paths):
    """Raise ``Wrong`` if the dense model's loss depends on one of these weights: then it is the adapter that is dead, and not the layer."""
    found = gradients(dense, batch, [weight_of(dense, path) for path in paths])
    for path, gradient in zip(paths, found, strict=True):
        if gradient is not None and gradient.any():
            raise Wrong(f"{path}: the weight has a gradient and the adapter has none")


def begin(model_type: str) -> Trial:
    """Build, adapt, and make the dense model beside it. Raises a minilora error where the adapter is refused."""
    bare = tiny.build(model_type)
    return begin_with(bare, batches.batch_for(bare))


def begin_with(bare: nn.Module, batch: dict) -> Trial:
    """The same with a model and a batch that are there already."""
    config = minilora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear")
    adapted, trains, refusal = randomize(minilora.inject(copy.deepcopy(bare), config)), False, ""
    try:
        dead = dead_layers(adapted, batch)
    except RuntimeError:
        trains = True
        dead = dead_layers(randomize(minilora.inject(copy.deepcopy(bare), config)).train(), batch)
    if dead:
        _are_dead(with_updates(copy.deepcopy(bare), updates_of(adapted), trains=True).train(trains), batch, dead)
        try:
            minilora.check_adapter(adapted, batch)
        except minilora.MiniLoraError as error:  # otherwise they are experts without a token, which the check tells
            refusal = str(error)
            config = dataclasses.replace(config, exclude_modules=dead)
            adapted = randomize(minilora.inject(copy.deepcopy(bare), config))
    dense = with_updates(copy.deepcopy(bare), updates_of(adapted))
    covered, others = coverage(adapted)
    counts = (len(covered), len(covered) + len(others))
    return Trial(bare, batch, config, adapted, dense, call(dense, batch), counts, trains, refusal)


# ---- the checks


def law(trial):
    """The adapted model computes what ``W + s B A`` computes, and it is not what ``W`` computes."""
    equal(call(trial.adapted, trial.batch), trial.wanted, CLOSE, "adapted against dense")
    if far(call(trial.bare, trial.batch), trial.wanted) < 1e-3:
        raise Wrong("the update is not felt")


def alive(trial):
    """``check_adapter`` finds every layer alive, or names one that is not."""
    model = trial.again().train(trial.trains)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is skipped at random is the same in both
        report = minilora.check_adapter(model, trial.batch)
    silent = set(dead_layers(model, trial.batch)) - set(report.unreached)
    if silent:
        raise Wrong(f"no gradient and nothing said: {sorted(silent)[0]}")
    if trial.refusal:
        raise minilora.errors.StateError(trial.refusal)


def step(trial):
    """Gradients of A and B are those that the dense model's weights say; one step moves the adapter and nothing else."""
    model = trial.again().train(trial.trains)
    held = adapters(model)
    dense = with_updates(trial.copy(), updates_of(model), trains=True).train(trial.trains)
    weights = [weight_of(dense, path) for path in held]
    of_weights = gradients(dense, trial.batch, weights)
    parts = [part for adapter in held.values() for part in (adapter.lora_A, adapter.lora_B)]
    found = gradients(model, trial.batch, parts)
    largest = max((float(g.abs().max()) for g in found if g is not None), default=0.0)
    for (path, adapter), whole, *pair in zip(held.items(), of_weights, found[::2], found[1::2], strict=True):
        if (whole is None) != (pair[0] is None):
            raise Wrong(f"{path}: gradient {'missing' if pair[0] is None else 'from nowhere'}")
        if whole is None:
            continue
        a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
        whole = unturned(place_of(dense, path)[0], whole, b @ a).double()
        wanted = SCALING * b.transpose(-1, -2) @ whole, SCALING * whole @ a.transpose(-1, -2)
        for got, want in zip(pair, wanted, strict=True):
            off = float((got - want).abs().max())
            if off > CLOSE_GRADIENT * float(want.abs().max()) + 1e-5 * largest:
                raise Wrong(f"{path}: gradient off by {off / float(want.abs().max().clamp(min=1e-12)):.0e}")
    _moves(trial)


def _moves(trial):
    """One step of SGD in train mode (in eval mode where the bare model cannot be called otherwise)."""
    model = trial.again()
    own = {id(p) for adapter in adapters(model).values() for p in (adapter.lora_A, adapter.lora_B)}
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {id(p) for p in trains.values()} != own:
        raise Wrong("something else than the adapter trains")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        found = batches.outputs(model.train(), trial.batch)
    except Exception:
        found = batches.outputs(model.eval(), trial.batch)
    loss = loss_of(found)
    if loss.requires_grad:
        loss.backward()
    reached = {name for name, p in trains.items() if p.grad is not None and p.grad.any()}
    torch.optim.AdamW(trains.values(), lr=1e-2, weight_decay=0.0).step()  # moves whatever has a gradient, however small
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if strange := moved ^ reached:
        raise Wrong(f"{sorted(strange)[0]} {'moved' if strange & moved else 'did not move'}")


def merge(trial):
    """Merged it computes the same; unmerged it has the same bytes as before."""
    model = trial.again()
    before, state = call(model, trial.batch), {name: p.clone() for name, p in model.state_dict().items()}
    minilora.merge(model)
    equal(call(model, trial.batch), trial.wanted, CLOSE, "merged against dense")
    minilora.unmerge(model)
    after = model.state_dict()
    if state.keys() != after.keys() or not all(torch.equal(state[name], after[name]) for name in state):
        raise Wrong("unmerged is another model")
    if far(call(model, trial.batch), before) != 0:
        raise Wrong("unmerged computes something else")


def reload(trial):
    """Saved and loaded onto the bare model it holds the same numbers, and computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        minilora.save_adapter(trial.adapted, folder)
        model = trial.copy()
        minilora.load_adapter(model, folder)
    if not same_updates(updates_of(model), updates_of(trial.adapted)):
        raise Wrong("reloaded holds other numbers")
    equal(call(model, trial.batch), call(trial.adapted, trial.batch), CLOSE_TO_PEFT, "reloaded against saved")


def packed(trial):
    """In four bits it computes what the decoded weights compute, with and without an adapter."""
    model = minilora.quantize_model(trial.copy())
    decoded = {
        path: module.quantized().dequantize()
        for path, module in model.named_modules()
        if isinstance(module, (minilora.QuantLinear, QuantExperts))
    }
    dense = trial.copy()
    for path, weight in decoded.items():
        home, name = place_of(dense, path)
        setattr(home, name, nn.Parameter(turned(home, home._parameters[name], weight), requires_grad=False))
    equal(call(model, trial.batch), call(dense, trial.batch), CLOSE, "packed against decoded")
    minilora.inject(model, trial.config)
    randomize(model)
    equal(
        call(model, trial.batch),
        call(with_updates(dense, updates_of(model)), trial.batch),
        CLOSE,
        "packed and adapted against decoded",
    )


class PeftFault(Exception):
    """PEFT raises, or computes something else than the law says; minilora is compared with the law alone."""


# Layers of these names PEFT takes for the experts of models whose experts were layers once, wherever they stand (its
# ``_convert_peft_config_moe``): the adapter of a dense layer or a shared expert is then left out, without a word.
LAYERS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def asked_for(trial, paths) -> dict:
    """The fields of a config that name these layers, in either library."""
    experts = [path for path in paths if adapters(trial.adapted)[path].on == "experts"]
    rest = [path for path in paths if path not in set(experts)]
    return {"target_modules": rest or None, "target_parameters": experts or None}


def _takes(model, asked) -> bool:
    """Whether PEFT adapts the parameters that it was asked to, and not others that it takes for what was asked."""
    found = model.peft_config["default"].target_parameters or ()
    bare = {path.removeprefix("base_model.model.") for path in found}
    return all(any(ends_with(path, name) for name in bare) for path in asked["target_parameters"] or ()) and (
        bool(found) == bool(asked["target_parameters"])
    )


def peft_reads(trial):
    """PEFT loads minilora's folder and computes the same; where it takes some layers for experts, those that it leaves alone."""
    paths = list(adapters(trial.adapted))
    try:
        if _peft_reads(trial, paths):
            return
        fault = None
    except PeftFault as error:
        fault = error
    rest = [
        path for path in paths if path.rpartition(".")[2] not in LAYERS or adapters(trial.adapted)[path].on == "experts"
    ]
    if rest == paths or not _reads(trial, rest):
        raise fault or Wrong("PEFT takes other layers for experts than is known")
    raise PeftFault(
        "takes layers named as experts for experts, and adapts bare parameters instead; the other layers are right"
    )


def _reads(trial, paths) -> bool:
    try:
        return _peft_reads(trial, paths)
    except PeftFault:
        return False


def _peft_reads(trial, paths) -> bool:
    """False where PEFT adapts parameters of experts and not the layers that the file names."""
    import peft

    asked = asked_for(trial, paths)
    ours = randomize(minilora.inject(trial.copy(), dataclasses.replace(trial.config, **asked, exclude_modules=None)))
    want = updates_of(ours)
    with tempfile.TemporaryDirectory() as folder:
        minilora.save_adapter(ours, folder)
        try:
            model = peft.PeftModel.from_pretrained(trial.copy(), folder)
            got = call(model, trial.batch)
        except Exception as error:
            raise PeftFault(f"raises {type(error).__name__}: {one_line(error).partition('. ')[0]}") from error
    if not _takes(model, asked):
        return False
    if not same_updates(updates_in_peft(model), want):
        if not _peft_reads_its_own(trial, paths):
            raise PeftFault("does not read back its own file: some layers get other names, and stay at zero")
        raise Wrong("PEFT reads another adapter")
    # Between the two limits it is the model that rounds: routers, and states that go from word to word, make more of a last digit.
    if (
        far(got, call(ours, trial.batch)) > CLOSE_TO_PEFT
        and far(got, call(with_updates(trial.copy(), want), trial.batch)) > CLOSE
    ):
        raise PeftFault("holds the same update and computes something else than the law")
    return True


def _peft_reads_its_own(trial, paths) -> bool:
    """Whether PEFT, saving the same layers and loading that, has what it had."""
    import peft

    asked = asked_for(trial, paths)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, **asked, init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft.get_peft_model(trial.copy(), config)
        theirs.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(trial.copy(), folder)
    return same_updates(updates_in_peft(again), updates_in_peft(theirs))


def peft_writes(trial):
    """minilora loads PEFT's folder and computes the same, also where PEFT made experts of layers that were named as such."""
    import peft

    asked = asked_for(trial, list(adapters(trial.adapted)))
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, **asked, init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.manual_seed(11)
            theirs = peft.get_peft_model(trial.copy(), config).eval()
            theirs.save_pretrained(folder)
            want = call(theirs, trial.batch)
        except Exception as error:
            raise PeftFault(f"raises {type(error).__name__}: {one_line(error).partition('. ')[0]}") from error
        model = trial.copy()
        minilora.load_adapter(model, folder)
    if not same_updates(updates_of(model), updates_in_peft(theirs)):
        raise Wrong("minilora reads another adapter than PEFT wrote")
    got = call(model, trial.batch)
    if far(got, want) > CLOSE_TO_PEFT:
        equal(
            got,
            call(with_updates(trial.copy(), updates_of(model)), trial.batch),
            CLOSE,
            "loaded from PEFT against dense",
        )
        raise PeftFault("computes something else than the law")


CHECKS = {check.__name__: check for check in (law, alive, step, merge, packed, reload, peft_reads, peft_writes)}


@dataclass
class Outcome:
    """What became of one architecture: each check's answer by its name, or why there is no model."""

    model_type: str
    kind: str = ""
    covers: tuple[int, int] = (0, 0)
    answers: dict = field(default_factory=dict)
    not_built: str = ""


def one_line(error) -> str:
    """Its first line, without the name of a folder that is gone."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/?", "", line)[:200]


def examine(model_type: str) -> Outcome:
    """All checks on one architecture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _examine(model_type)


def _examine(model_type: str) -> Outcome:
    outcome = Outcome(model_type)
    try:
        trial = begin(model_type)
    except minilora.MiniLoraError as error:
        outcome.answers = dict.fromkeys(CHECKS, f"refused: {one_line(error)}")
        return outcome
    except Wrong as error:
        outcome.answers = dict.fromkeys(CHECKS, f"WRONG: {one_line(error)}")
        return outcome
    except Exception as error:
        outcome.not_built = f"{type(error).__name__}: {one_line(error)}"
        return outcome
    outcome.kind, outcome.covers = type(trial.bare).__name__, trial.covers
    for name, check in CHECKS.items():
        try:
            check(trial)
            outcome.answers[name] = "right"
        except minilora.MiniLoraError as error:
            outcome.answers[name] = f"refused: {one_line(error)}"
        except PeftFault as error:
            outcome.answers[name] = f"PEFT: {one_line(error)}"
        except Wrong as error:
            outcome.answers[name] = f"WRONG: {one_line(error)}"
        except Exception as error:
            outcome.answers[name] = f"WRONG: crash, {type(error).__name__}: {one_line(error)}"
    return outcome
