"""``--device``, ``--dtype`` and ``--attention``: what they choose, and what they refuse.

No GPU has run this: torch's answers are made up here, and where weights must arrive on a device, it is "meta".
"""

# ruff: noqa: E501  (a row is one line)

import contextlib

import pytest
import torch

from minilora import QuantConfig, quantize_model
from minilora.cli import main
from minilora.errors import ConfigError, MissingPackageError, StateError
from minilora.hf import devices, load_model
from minilora.hf.devices import choose, settled
from minilora.hf.packed import save_packed
from minilora.job.finetune import Job, fine_tune
from minilora.measure.meter import Meter

pytest.importorskip("transformers")


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, bf16, broken)``: what torch says of this machine."""

    def be(gpus=0, bf16=True, broken="", mps=False):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "A100")
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(devices, "_broken", lambda place: broken)

    return be


def words(*asked):
    place = choose(*asked)
    return str(place.device), str(place.dtype).removeprefix("torch."), place.said


@pytest.mark.parametrize(
    ("has", "asked", "device", "dtype", "said"),
    [
        ({"gpus": 2}, (), "cuda:0", "bfloat16", "cuda:0 (A100) in bfloat16"),
        ({"gpus": 2, "bf16": False}, (), "cuda:0", "float32", "cuda:0 (A100) in float32"),
        ({"gpus": 2}, ("auto", "float16"), "cuda:0", "float16", "cuda:0 (A100) in float16"),
        ({"gpus": 2}, ("cuda:1",), "cuda:1", "bfloat16", "cuda:1 (A100) in bfloat16"),
        ({"gpus": 2}, ("cpu",), "cpu", "float32", "the CPU in float32"),
        ({"gpus": 2}, ("cpu", "bfloat16"), "cpu", "bfloat16", "the CPU in bfloat16"),
        ({"mps": True}, ("mps",), "mps", "float32", "mps in float32"),
        ({"gpus": 1, "broken": "no kernel image"}, (), "cpu", "float32", "the CPU in float32 (cuda:0 (A100) does not work: no kernel image)"),
        ({"mps": True}, (), "cpu", "float32", "the CPU in float32 (minilora has not been run on this machine's Apple GPU; --device mps takes it)"),
    ],
)  # fmt: skip
def test_what_is_chosen_and_said(machine, has, asked, device, dtype, said):
    machine(**has)
    assert words(*asked) == (device, dtype, said)


def test_why_it_is_the_cpu(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert words() == ("cpu", "float32", "the CPU in float32 (this torch is built without CUDA)")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore of it")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert words()[2] == "the CPU in float32 (Found no NVIDIA driver on your system.)"


def test_every_process_of_a_machine_takes_its_own(machine, monkeypatch):
    machine(gpus=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert words()[0] == words("cuda")[0] == "cuda:1" and words("cuda:0")[0] == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "2")
    for asked in ("auto", "cuda"):
        with pytest.raises(
            ConfigError, match=f"device='{asked}': this machine has cuda:0 to cuda:1, and process 2 wants"
        ):
            choose(asked)


@pytest.mark.parametrize(("has", "asked"), [({"gpus": 2}, "cuda:0"), ({"gpus": 2}, "cuda:1"), ({"mps": True}, "mps")])
def test_processes_of_a_machine_do_not_share_a_device(machine, monkeypatch, has, asked):
    machine(**has)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"device='{asked}': torchrun has started 2 processes .*; wanted cuda"):
        choose(asked)
    assert words("cpu")[0] == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert words(asked)[0] == asked


@pytest.mark.parametrize(
    ("has", "asked", "message"),
    [
        ({}, "cuda", "device='cuda': .*; wanted auto or cpu"),
        ({}, "mps", "device='mps': there is no Apple GPU"),
        ({"gpus": 2}, "cuda:2", "device='cuda:2': this machine has cuda:0 to cuda:1; wanted one that is there, or cpu"),
        ({"gpus": 1}, "cuda:7", "device='cuda:7': this machine has cuda:0 alone"),
        ({"gpus": 1, "broken": "busy"}, "cuda", r"device='cuda': cuda:0 \(A100\) does not work: busy; wanted auto or cpu"),
        *(({}, odd, "wanted auto, cpu, cuda, cuda:N") for odd in ("tpu", "cuda:-1", "cuda:", "CPU", "", None, "cuda:0\n")),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused(machine, has, asked, message):
    machine(**has)
    with pytest.raises(ConfigError, match=message) as caught:
        choose(asked)
    assert "\n" not in str(caught.value)


def test_a_device_that_does_not_work_is_seen():
    assert devices._broken(torch.device("cpu")) == ""
    if not torch.cuda.is_available():
        assert devices._broken(torch.device("cuda", 0))


VERBS = {
    "train": ["--data", "/nowhere.jsonl", "--out", "{out}"],
    "generate": ["hi"],
    "quantize": ["--out", "{out}"],
    "plan": ["--no-measure"],
    "bench": [],
    "merge": ["--adapter", "/nowhere", "--out", "{out}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_refuses_it_before_anything_is_read(machine, capsys, tmp_path, verb):
    machine()
    more = [word.format(out=tmp_path / "out") for word in VERBS[verb]]
    assert main([verb, "--model", "/nowhere/at/all", "--device", "cuda:1", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minilora: device='cuda:1': ") and line.endswith("; wanted auto or cpu")
    assert not (tmp_path / "out").exists()


def test_a_job_knows_what_was_chosen(machine):
    machine(gpus=1)
    job = settled(Job("m", "d", "o"), choose())
    assert (job.device, job.dtype) == ("cuda:0", "bfloat16")


# ---- attention


def test_attention_goes_to_transformers(model_folder, tmp_path):
    save_packed(quantize_model(load_model(model_folder), QuantConfig()), tmp_path / "packed")
    for folder in (model_folder, str(tmp_path / "packed")):
        for name in ("eager", "sdpa"):
            assert load_model(folder, attention=name).config._attn_implementation == name
    assert load_model(model_folder, quant=QuantConfig(), attention="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["flash", "owner/kernel", "paged|eager", "a\x1b[2J"])
def test_an_attention_that_transformers_has_not_is_refused(capsys, tmp_path, name):
    flags = ["--model", "/nowhere/at/all", "--data", "/nowhere", "--out", str(tmp_path / "out"), "--attention", name]
    assert main(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("minilora: attention=") and "wanted one of auto, eager, sdpa, " in line and line.isprintable()
    )


def test_an_attention_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(MissingPackageError, match="attention='flash_attention_2': its package is not installed"):
        choose("cpu", "auto", "flash_attention_2")


# ---- weights and states arrive


@pytest.mark.parametrize("packed", [False, True])
def test_weights_arrive_on_the_device(model_folder, tmp_path, packed):
    folder = model_folder
    if packed:
        folder = str(tmp_path / "packed")
        save_packed(quantize_model(load_model(model_folder), QuantConfig(double_quant=True)), folder)
    model = load_model(folder, torch.bfloat16, device="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    wanted = load_model(folder, torch.bfloat16).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in wanted.items()
    }


def test_without_accelerate_it_is_said(model_folder, monkeypatch):
    from minilora.hf import load

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="device='meta': needs accelerate; run 'pip install accelerate'"):
        load_model(model_folder, device="meta")
    load_model(model_folder, device="cpu")


def test_memory_of_a_gpu_is_read_from_torch(monkeypatch):
    asked = []
    for name, said in (("memory_allocated", 5), ("max_memory_allocated", 9), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(
            torch.cuda, name, lambda place, name=name, said=said: asked.append((name, str(place))) or said
        )
    meter = Meter("cuda:1")
    meter.reset()
    assert meter.works and (meter.held(), meter.peak()) == (5, 9)
    assert asked == [
        (name, "cuda:1") for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    ]
    with pytest.raises(StateError, match="mps: torch tells no peak memory"):
        Meter("mps").reset()


def test_a_job_says_where_it_runs(model_folder, tmp_path):
    from minilora.training.settings import TrainConfig

    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    said = []
    job = Job(
        model_folder,
        str(tmp_path / "d.jsonl"),
        str(tmp_path / "run"),
        device="cpu",
        attention="eager",
        training=TrainConfig(steps=1, batch_size=2),
    )
    fine_tune(job, said.append)
    assert said[0] == f"3 examples in {tmp_path / 'd.jsonl'}; loading {model_folder} on the CPU in float32"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "eager" in page
