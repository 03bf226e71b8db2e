"""Any order of calls: a model with adapters behaves as a plain dictionary of float64 matrices does.

The oracle knows dense weights and updates only, computed from the definitions and not with minilora. After every step the layers
must compute ``F.linear(x, W + updates, bias)``, the base must be the very same bytes, exactly the active adapters must train, and
nothing of an inactive one may be among the model's parameters. A refused call must change nothing. A call that a Ctrl-C stops at any line
has happened, or it has not; batches whose rows want different adapters run between the calls, and while adapters come and go beside.
"""

import contextlib
import copy
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import minilora
from minilora import LoraConfig, MiniLoraError, QuantConfig, QuantLinear
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of
from minilora.many.adapted import disabled
from minilora.many.batched import BASE, batch_adapters
from minilora.many.combine import add_weighted_adapter
from minilora.many.hotswap import hotswap_adapter
from minilora.store.load import WEIGHTS_FILE, adapter_state_dict
from tests.interrupt import Interrupt
from tests.models import Conv1D, finished

# A file that was opened in the very line before the interrupt is closed by the garbage collector, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")

SHAPES = {
    "first": (12, 20),
    "mid": (20, 14),
    "packed": (14, 10),
    "last": (10, 5),
}  # in, out: one Linear, Conv1D, NF4, Linear
NAMES = ("a", "b", "c", "d", "e")
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
PLAIN = ("lora", "rslora")
MISTAKES = ("typo", "name", "taken", "unknown", "twice", "damaged", "missing", "swap", "density", "extra")
place = st.integers(0, 4)  # which of the adapters that there are
TOLERANCE = 2e-5  # of the largest value of a layer's output


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mid = nn.Linear(12, 20), Conv1D(14, 20)
        self.packed, self.last = nn.Linear(14, 10), nn.Linear(10, 5)

    def forward(self, x):
        for layer in (self.first, self.mid, self.packed):
            x = torch.tanh(layer(x))
        return self.last(x)


def make_net():
    torch.manual_seed(0)
    net = finished(Net())
    net.packed = QuantLinear.from_linear(net.packed, QuantConfig(blocksize=32, double_quant=True))
    return net


def content(tensors):
    return {key: (tensor.dtype, tensor.shape, tensor.detach().clone()) for key, tensor in tensors.items()}


def same_content(left, right):
    return left.keys() == right.keys() and all(
        left[key][:2] == right[key][:2] and torch.equal(left[key][2], right[key][2]) for key in left
    )


@dataclass
class Known:
    """What the oracle knows of an adapter."""

    kind: str
    r: int
    scaling: float
    deltas: dict[str, torch.Tensor]  # path -> [out, in] in float64
    biases: dict[str, torch.Tensor] = field(default_factory=dict)  # path -> [out] in float64
    trains: bool = True


class Machine(RuleBasedStateMachine):
    """One model and its oracle. Without ``biases`` no adapter trains one."""

    def __init__(self, biases):
        super().__init__()
        self.may_train_biases = biases
        self.model = make_net()
        self.layers = {path: getattr(self.model, path) for path in SHAPES}
        self.bytes = content(self.model.state_dict())
        self.dense, self.bias = {}, {}
        for path, layer in self.layers.items():
            weight = layer.quantized().dequantize() if path == "packed" else layer.weight.detach()
            self.dense[path] = (weight.t() if path == "mid" else weight).double().clone()
            self.bias[path] = layer.bias.detach().double().clone()
        generator = torch.Generator().manual_seed(3)
        self.inputs = {path: torch.randn(4, shape[0], generator=generator) for path, shape in SHAPES.items()}
        self.known: dict[str, Known] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.folder = Path(tempfile.mkdtemp(prefix="minilora-stateful-"))
        self.saved = 0
        self.draws = 0
        self.stop_at = 0  # the line of the next change before which an interrupt comes

    def teardown(self):
        shutil.rmtree(self.folder)

    # ---- what the oracle thinks of a call

    def random(self, *shape):
        self.draws += 1
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.draws)) * 0.3

    def refuses(self, shown, folded):
        """Whether these cannot stand together: DoRA over a merged update, or two trained copies of one bias."""
        shown = [name for name in shown if name not in folded]
        for path in SHAPES:
            here = [name for name in folded if path in self.known[name].deltas]
            reads = [name for name in shown if self.known[name].kind == "dora" and path in self.known[name].deltas]
            if here and reads:
                return True
            if sum(path in self.known[name].biases for name in (*folded, *shown)) > 1:
                return True
        return False

    def update(self, name, path, A, B, magnitude=None):
        """The update of ``W`` by definition, for the values that lie in the adapter."""
        known, W = self.known[name], self.dense[path]
        low = known.scaling * B.double() @ A.double()
        if known.kind == "dora":
            moved = W + low
            return magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - W
        if known.kind == "pissa":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            return low - U[:, : known.r] * S[: known.r] @ Vh[: known.r]
        return low

    def state(self):
        """Everything that a refused call must leave alone."""
        places = [(path, id(module), module.training) for path, module in self.model.named_modules()]
        trains = [(path, id(p), p.requires_grad) for path, p in self.model.named_parameters()]
        if not self.known:
            return places, trains, sorted(self.model.__dict__)
        record = adapters_of(self.model)
        kept = {path: [(name, id(value)) for name, value in slot.kept.items()] for path, slot in record.slots.items()}
        own = {
            name: [p.requires_grad for v in record.named(name).values() for p in own_parameters(v)]
            for name in self.known
        }
        names = (dict(record.configs), dict(record.variants), record.active, record.merged)
        return places, trains, sorted(self.model.__dict__), kept, own, names

    def tensors(self):
        return {name: content(adapter_state_dict(self.model, name)) for name in self.known}

    @contextlib.contextmanager
    def refused(self):
        before, tensors = self.state(), self.tensors()
        with pytest.raises(MiniLoraError):
            yield
        assert self.state() == before
        after = self.tensors()
        assert after.keys() == tensors.keys() and all(same_content(after[name], tensors[name]) for name in after)

    def do(self, call):
        """Run a change, if need be twice: stopped by an interrupt, it must have happened whole or not at all."""
        at, self.stop_at = self.stop_at, 0
        if not at:
            return call()
        before, tensors = self.state(), self.tensors()
        try:
            with Interrupt(at):
                return call()
        except KeyboardInterrupt:
            after = self.tensors() if self.state() == before else {}
            if after.keys() == tensors.keys() and all(same_content(after[name], tensors[name]) for name in after):
                return call()
        return None

    @rule(at=st.integers(1, 1500))
    def stop_the_next_change(self, at):
        self.stop_at = at

    def shown(self, names):
        """The oracle's part of making exactly these active."""
        self.active = list(names)
        for name, known in self.known.items():
            known.trains = name in names

    def one(self, where):
        """One of the adapters that there are."""
        return sorted(self.known)[where % len(self.known)]

    def several(self, places):
        return list(dict.fromkeys(map(self.one, places)))

    def new(self):
        """A name that is free, or a taken one when all are in use."""
        return next((name for name in NAMES if name not in self.known), NAMES[0])

    # ---- rules

    @initialize(kind=st.sampled_from(sorted(KINDS)))
    def one_adapter(self, kind):
        self.inject(kind, 2, 5, ["first", "mid", "packed"], False, True)

    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        r=st.sampled_from([1, 2, 4]),
        alpha=st.sampled_from([3, 5, 6.5]),
        paths=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True),
        bias=st.booleans(),
        activate=st.booleans(),
    )
    def add(self, kind, r, alpha, paths, bias, activate):
        self.inject(kind, r, alpha, paths, bias, activate)

    def inject(self, kind, r, alpha, paths, bias, activate):
        name = self.new()
        bias = bias and self.may_train_biases
        config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=paths, bias="lora_only" if bias else "none", **KINDS[kind]
        )
        scaling = alpha / (r**0.5 if kind == "rslora" else r)
        new = Known(kind, r, scaling, {path: torch.zeros_like(self.dense[path]) for path in paths})
        if bias:
            new.biases = {path: self.bias[path].clone() for path in paths}
        self.put(name, new, activate, lambda: minilora.inject(self.model, config, name, activate=activate))

    def put(self, name, new, activate, call, trainable=True):
        """Run ``call``, which adds an adapter; it must be refused exactly where the oracle says so."""
        if name in self.known:
            with self.refused():
                call()
            return
        self.known[name] = new
        bad = activate and self.refuses([name], self.merged)
        if bad:
            del self.known[name]
            with self.refused():
                call()
            return
        del self.known[name]
        self.do(call)
        self.known[name] = new
        if activate:
            self.shown([name])
        new.trains = activate and trainable

    @precondition(lambda self: self.known)
    @rule(places=st.lists(place, min_size=1, max_size=3))
    def set_adapters(self, places):
        names = self.several(places)
        if self.refuses(names, self.merged):
            with self.refused():
                minilora.set_adapter(self.model, names)
            return
        self.do(lambda: minilora.set_adapter(self.model, names if len(names) > 1 else names[0]))
        self.shown(names)

    @precondition(lambda self: self.known)
    @rule(where=place)
    def write_values(self, where):
        """What an optimizer does to an adapter."""
        name = self.one(where)
        if name in self.merged:
            return
        known = self.known[name]
        tensors = adapter_state_dict(self.model, name)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.copy_(
                    self.random(*tensor.shape).abs() + 0.2 if tensor.dim() == 1 else self.random(*tensor.shape)
                )
        for path in known.deltas:
            key = f"base_model.model.{path}."
            parts = tensors[key + "lora_A.weight"], tensors[key + "lora_B.weight"]
            known.deltas[path] = self.update(name, path, *parts, tensors.get(key + "lora_magnitude_vector"))
        for path in known.biases:
            known.biases[path] = tensors[f"base_model.model.{path}.base_layer.bias"].double().clone()

    @rule(depth=st.integers(1, 3), fails=st.booleans())
    def disable(self, depth, fails):
        before = self.state()

        def inside(left):
            with disabled(self.model):
                if left > 1:
                    inside(left - 1)
                assert same_content(content(self.model.state_dict()), self.bytes)
                assert all(getattr(self.model, path) is layer for path, layer in self.layers.items())
                if fails:
                    raise KeyError("inside")

        if fails:
            with pytest.raises(KeyError):
                inside(depth)
        else:
            inside(depth)
        assert self.state() == before

    @precondition(lambda self: self.known)
    @rule(places=st.lists(st.none() | place, min_size=2, max_size=4), beside=st.booleans())
    def mix(self, places, beside):
        """A batch of which every row gets its own adapter; with ``beside`` another adapter comes and goes while it runs."""
        names = [BASE if where is None else self.one(where) for where in places]
        used = [self.known[name] for name in names if name != BASE]
        copies = any(self.known[name].biases for name in self.active)
        if self.merged or copies or any(known.kind == "dora" or known.biases for known in used):
            with self.refused(), batch_adapters(self.model, names):
                pass
            return
        before = self.state()
        with torch.no_grad(), batch_adapters(self.model, names):
            for again in range(1 + beside):
                for path, x in self.inputs.items():
                    rows = x[: len(names)]
                    got = getattr(self.model, path)(rows)
                    for row, name in enumerate(names):
                        delta = 0 if name == BASE else self.known[name].deltas.get(path, 0)
                        want = F.linear(rows[row].double(), self.dense[path] + delta, self.bias[path])
                        assert (got[row].double() - want).abs().max() < TOLERANCE * want.abs().max(), (
                            f"{path}, row {row}"
                        )
                if beside and not again:
                    config = LoraConfig(r=1, lora_alpha=2, target_modules=["last"], init_lora_weights=False)
                    minilora.inject(self.model, config, "beside", activate=False)
            with pytest.raises(MiniLoraError, match="batch that mixes"):
                minilora.set_adapter(self.model, self.one(0))
        if beside:
            minilora.delete_adapter(self.model, "beside")
        assert self.state() == before

    @precondition(lambda self: self.known)
    @rule(places=st.none() | st.lists(place, min_size=1, max_size=2))
    def merge(self, places):
        names = None if places is None else self.several(places)
        more = self.active if names is None else names
        chosen = [*self.merged, *more]  # what is merged already stays in
        rest = [name for name in self.active if name not in chosen]
        if not chosen or set(more) & set(self.merged) or self.refuses([*rest, *chosen], chosen):
            with self.refused():
                minilora.merge(self.model, names)
            return
        report = self.do(lambda: minilora.merge(self.model, names))
        self.merged = chosen
        if report is None:  # stopped after it had happened
            return
        assert set(report.layers) == {path for name in chosen for path in self.known[name].deltas}
        deltas = [delta for name in chosen for delta in self.known[name].deltas.values()]
        if any(
            delta.norm() > 1e-3 for delta in deltas
        ):  # of an update that is rounding itself, rounding may leave anything
            assert report.survived > 0.99

    @rule()
    def unmerge(self):
        if not self.merged:
            with self.refused():
                minilora.unmerge(self.model)
            return
        self.do(lambda: minilora.unmerge(self.model))
        self.merged = []

    def save(self, name):
        self.saved += 1
        folder = self.folder / str(self.saved)
        before = self.state()
        minilora.save_adapter(self.model, folder, name)
        assert self.state() == before
        return folder

    @precondition(lambda self: self.known)
    @rule(where=place, activate=st.booleans(), trainable=st.booleans())
    def save_and_load(self, where, activate, trainable):
        source, name = self.one(where), self.new()
        folder = self.save(source)
        new = copy.deepcopy(self.known[source])
        self.put(
            name,
            new,
            activate,
            lambda: minilora.load_adapter(self.model, folder, name, is_trainable=trainable, activate=activate),
            trainable,
        )

    @precondition(lambda self: self.known)
    @rule(where=place)
    def delete(self, where):
        name = self.one(where)
        others = sorted(set(self.known) - {name})
        if name in self.merged:
            with self.refused():
                minilora.delete_adapter(self.model, name)
            return
        if self.active == [name] and any(self.refuses([other], self.merged) for other in others):
            return  # what becomes active then is not said
        self.do(lambda: minilora.delete_adapter(self.model, name))
        del self.known[name]
        if name not in self.active:
            return
        self.active.remove(name)
        if not self.active:
            shown = adapters_of(self.model).active
            assert len(shown) == min(1, len(others)) and set(shown) <= set(others)
            self.shown(shown)

    @precondition(lambda self: self.known)
    @rule(
        places=st.lists(place, min_size=1, max_size=3),
        weights=st.lists(st.sampled_from([-1.5, 0.25, 2.0]), min_size=3, max_size=3),
    )
    def add_weighted(self, places, weights):
        sources, name = [self.one(where) for where in places], self.new()

        def call():
            add_weighted_adapter(self.model, sources, weights[: len(sources)], name, "cat")

        parts = [self.known[source] for source in sources]
        if name in self.known or any(part.kind == "dora" for part in parts):
            with self.refused():
                call()
            return
        before, tensors = self.state(), self.tensors()
        try:
            call()
        except MiniLoraError:
            assert any(part.kind == "pissa" for part in parts), "only PiSSA may be refused here"
            assert self.state() == before and self.tensors().keys() == tensors.keys()
            return
        deltas = {}
        for part, weight in zip(parts, weights, strict=False):
            for path, delta in part.deltas.items():
                deltas[path] = deltas.get(path, 0) + weight * delta
        biases = {path: self.bias[path].clone() for path in deltas} if any(part.biases for part in parts) else {}
        for part, weight in zip(parts, weights, strict=False):
            for path, bias in part.biases.items():
                biases[path] += weight * (bias - self.bias[path])
        ranks = adapters_of(self.model).configs[name].r
        self.known[name] = Known("lora", ranks, 1.0, deltas, biases, trains=False)

    @precondition(lambda self: self.known)
    @rule(giver=place, taker=place)
    def hotswap(self, giver, taker):
        source, name = self.one(giver), self.one(taker)
        if name in self.merged:
            return
        folder = self.save(source)
        new, old = self.known[source], self.known[name]
        kinds = {"plain" if each.kind in PLAIN else each.kind for each in (new, old)}
        outside = not new.deltas.keys() <= old.deltas.keys()
        if len(kinds) > 1 or outside or new.r > old.r or new.biases:
            with self.refused():
                hotswap_adapter(self.model, folder, name)
            return
        parameters = {key: tensor.data_ptr() for key, tensor in adapter_state_dict(self.model, name).items()}
        before, tensors = self.state(), self.tensors()
        try:
            hotswap_adapter(self.model, folder, name)
        except MiniLoraError:
            plain = kinds == {"plain"} and not old.biases
            alike = new.deltas.keys() == old.deltas.keys() and new.r == old.r and not old.biases
            assert not plain and not alike, "nothing stood in the way of this exchange"
            assert self.state() == before and all(same_content(self.tensors()[n], tensors[n]) for n in tensors)
            return
        assert self.state() == before
        assert parameters == {key: tensor.data_ptr() for key, tensor in adapter_state_dict(self.model, name).items()}
        old.deltas = {path: new.deltas.get(path, torch.zeros_like(delta)).clone() for path, delta in old.deltas.items()}
        old.biases = {path: self.bias[path].clone() for path in old.biases}

    @precondition(lambda self: self.known)
    @rule(which=st.sampled_from(MISTAKES))
    def mistake(self, which):
        model, name = self.model, sorted(self.known)[0]
        lora = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "lsat"])
        if which in ("damaged", "extra"):
            folder = self.save(name)
            raw = (folder / WEIGHTS_FILE).read_bytes()
            (folder / WEIGHTS_FILE).write_bytes(raw[:-3] if which == "damaged" else raw.replace(b"lora_A", b"lora_C"))
        with self.refused():
            match which:
                case "typo":
                    minilora.inject(model, lora, "new")
                case "name":
                    minilora.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["first"]), "../new")
                case "taken":
                    minilora.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["last"]), name)
                case "twice":
                    minilora.set_adapter(model, [name, name])
                case "unknown":
                    minilora.merge(model, [name, "nobody"])
                case "damaged" | "extra":
                    minilora.load_adapter(model, folder, "new")
                case "missing":
                    minilora.load_adapter(model, self.folder / "nowhere", "new")
                case "swap":
                    hotswap_adapter(model, self.folder, "nobody")
                case "density":
                    add_weighted_adapter(model, [name], [1.0], "new", "ties", density=1.5)

    # ---- what always holds

    @invariant()
    def layers_compute_what_the_oracle_does(self):
        standing = list(dict.fromkeys((*self.merged, *self.active)))
        weights, biases = dict(self.dense), dict(self.bias)
        for name in standing:
            for path, delta in self.known[name].deltas.items():
                weights[path] = weights[path] + delta
            biases |= self.known[name].biases
        with torch.no_grad():
            for path, x in self.inputs.items():
                got, want = getattr(self.model, path)(x), F.linear(x.double(), weights[path], biases[path])
                far = (got.double() - want).abs().max() / want.abs().max()
                assert far < TOLERANCE, f"{path} is off by {far:.1e}; active {self.active}, merged {self.merged}"
            h = self.inputs["first"].double()
            for path in ("first", "mid", "packed"):
                h = torch.tanh(F.linear(h, weights[path], biases[path]))
            want = F.linear(h, weights["last"], biases["last"])
            torch.testing.assert_close(self.model(self.inputs["first"]).double(), want, rtol=1e-3, atol=1e-4)

    @invariant()
    def the_base_is_untouched(self):
        with disabled(self.model) if self.known else contextlib.nullcontext():
            assert same_content(content(self.model.state_dict()), self.bytes)
            assert all(getattr(self.model, path) is layer for path, layer in self.layers.items())
            assert not any(parameter.requires_grad for parameter in self.model.parameters())

    @invariant()
    def exactly_the_active_train_and_no_other_is_in_the_model(self):
        record = adapters_of(self.model)
        assert list(record.active) == self.active and list(record.merged) == self.merged
        assert record.configs.keys() == self.known.keys()
        inside = {id(p): p.requires_grad for p in self.model.parameters()}
        training = {each for each, trains in inside.items() if trains}
        for name, known in self.known.items():
            own = [p for value in record.named(name).values() for p in own_parameters(value)]
            assert all(p.requires_grad is known.trains for p in own), name
            if name not in self.active and name not in self.merged:
                assert not inside.keys() & {id(p) for p in own}, f"{name} is inactive and among the parameters"
            if name in self.active and name not in self.merged:
                assert {id(p) for p in own} <= inside.keys()
            if known.trains:
                training -= {id(p) for p in own}
        assert not training, "something trains that belongs to no active adapter"


def run(biases, examples, steps):
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, suppress_health_check=checks, report_multiple_bugs=False
    )
    run_state_machine_as_test(lambda: Machine(biases), settings=chosen)


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_any_order_of_calls(biases):
    run(biases, 40, 20)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_any_long_order_of_calls(biases):
    run(biases, 300, 40)
