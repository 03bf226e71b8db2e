"""``--plugin``: a variant and a codebook in a file of one's own, from training to answers, and what is refused."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import minilora
from minilora.cli import main
from minilora.errors import QuantizationError
from minilora.lora import adapter
from minilora.quant import codebooks
from minilora.quant.codebooks import Codebook, register_codebook
from minilora.store.load import read_adapter

pytest.importorskip("transformers")
VARIANT = """
    import torch
    from minilora import LoRALinear, register

    @register("gated_by_me")
    class Gated(LoRALinear):
        file_names = LoRALinear.file_names | {"gate": "lora_gate"}

        def __init__(self, base_layer, config, path=""):
            super().__init__(base_layer, config, path)
            self.gate = torch.nn.Parameter(torch.ones(1, device=self.lora_A.device))

        def update(self, x):
            return self.gate.to(x.dtype) * super().update(x)

        def delta_weight(self):
            return self.gate * super().delta_weight()

        def as_lora(self):
            A, B = super().as_lora()
            return A, self.gate * B
"""
BOOK = """
    from minilora import Codebook, register_codebook

    register_codebook(Codebook("mine4", tuple(max(k, -7) / 7 for k in range(-8, 8)), "for a test"))
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a plugin registers ends with the test."""
    monkeypatch.setattr(adapter, "VARIANTS", dict(adapter.VARIANTS))
    monkeypatch.setitem(adapter._ON, "linear", adapter.VARIANTS)
    for name in ("mine4",):
        monkeypatch.delitem(codebooks.CODEBOOKS, name, raising=False)
    yield
    codebooks.CODEBOOKS.pop("mine4", None)


def written(path, text):
    path.write_text(textwrap.dedent(text))
    return str(path)


@pytest.fixture
def files(tmp_path):
    data = tmp_path / "learn.jsonl"
    data.write_text('{"prompt": "hi", "completion": "yo"}\n' * 3)
    return {
        "data": str(data),
        "variant": written(tmp_path / "my_variant.py", VARIANT),
        "book": written(tmp_path / "my_book.py", BOOK),
    }


def run(capsys, *words):
    code = main([*map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def train(model, files, out):
    return [
        "train",
        "--model",
        model,
        "--data",
        files["data"],
        "--out",
        out,
        "--steps",
        "2",
        "--r",
        "3",
        "--max-length",
        "64",
    ]


def test_a_variant_and_a_codebook_of_ones_own_go_all_the_way(capsys, model_folder, files, tmp_path):
    plugins = ["--plugin", files["variant"], "--plugin", files["book"]]
    out = tmp_path / "run"
    code, _, err = run(
        capsys, *train(model_folder, files, out), "--variant", "gated_by_me", "--quant", "mine4", *plugins
    )
    assert code == 0, err
    assert f"{files['variant']}: variant 'gated_by_me'" in err and f"{files['book']}: codebook 'mine4'" in err
    stored = read_adapter(out)
    assert stored.variant == "gated_by_me" and any(name.endswith("lora_gate") for name in stored.tensors)
    assert "mine4" in (out / "report.html").read_text()
    ask = ["generate", "--model", model_folder, "--adapter", out, "--max-new-tokens", "3", "hi"]
    assert run(capsys, *ask[:-1], "--quant", "mine4", *plugins, "hi")[0] == 0
    merged = ["merge", "--model", model_folder, "--adapter", out, "--out", tmp_path / "merged", *plugins[:2]]
    assert run(capsys, *merged)[0] == 0
    export = [
        "export",
        "--model",
        model_folder,
        "--adapter",
        out,
        "--for",
        "vllm",
        "--out",
        tmp_path / "vllm",
        *plugins[:2],
    ]
    assert run(capsys, *export)[0] == 0


def test_without_it_the_way_out_is_said(model_folder, files, tmp_path):
    """In processes of their own: nothing of one is known to the next."""

    def minilora_of(*words):
        command = [sys.executable, "-m", "minilora", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(minilora.__file__).parents[1], timeout=300
        )

    out = tmp_path / "run"
    more = ["--variant", "gated_by_me"]
    assert minilora_of(*train(model_folder, files, out), *more, "--plugin", files["variant"]).returncode == 0
    done = minilora_of("generate", "--model", model_folder, "--adapter", out, "hi")
    assert done.returncode == 2 and "variant 'gated_by_me' is not registered" in done.stderr
    assert "--plugin FILE" in done.stderr


def test_a_file_of_settings_names_no_code(capsys, files, tmp_path):
    (tmp_path / "job.toml").write_text(f"plugin = {json.dumps(files['variant'])}\n")
    code, _, err = run(capsys, *train("m", files, tmp_path / "run"), "--config", tmp_path / "job.toml")
    assert code == 2 and "plugin: a file may not let code run; give --plugin on the command line" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nraise ZeroDivisionError('no')\n", ", line 2: ZeroDivisionError: no"),
        ("def f(:\n", ", line 1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", ", line 2: SystemExit: 3"),
        ("import no_such_package_of_mine\n", ", line 1: ModuleNotFoundError"),
        ("from minilora import LoRALinear, register\n@register('dora')\nclass D(LoRALinear): ...\n", "'dora' is taken by"),
        ("from minilora import Codebook, register_codebook\nregister_codebook(Codebook('nf4', (0., .1, .2, 1.), 'x'))\n", "'nf4' is taken"),
    ],
    ids=["error", "syntax", "exit", "import", "variant taken", "codebook taken"],
)  # fmt: skip
def test_one_that_fails_is_told_with_its_line(capsys, files, tmp_path, text, words):
    file = written(tmp_path / "bad.py", text)
    code, _, err = run(capsys, *train("m", files, tmp_path / "run"), "--plugin", file)
    assert code == 2 and err.startswith(f"minilora: plugin {file}") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["absent.py", "my_variant.txt", "."])
def test_what_is_no_file_of_python_is_refused(capsys, files, tmp_path, name):
    code, _, err = run(capsys, *train("m", files, tmp_path / "run"), "--plugin", tmp_path / name)
    assert code == 2 and "no such file of Python" in err


def test_one_that_registers_nothing_is_said_to(capsys, files, tmp_path):
    file = written(tmp_path / "empty.py", "")
    _, _, err = run(capsys, *train("m", files, tmp_path / "run"), "--plugin", file)
    assert f"{file}: registers no variant and no codebook" in err


@pytest.mark.parametrize("name", ["", "a b", "none", "a/b", "x" * 65])
def test_a_codebook_needs_a_name_that_can_be_typed(name):
    with pytest.raises(QuantizationError, match="codebook name"):
        register_codebook(Codebook(name, (-1.0, 0.0, 0.5, 1.0), "x"))
    with pytest.raises(QuantizationError, match="wanted a Codebook"):
        register_codebook("nf4")
