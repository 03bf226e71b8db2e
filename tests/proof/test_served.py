"""``minilora verify`` beside a real llama.cpp server on loopback: every case that it tells apart."""

import pytest

from minilora import inject, save_adapter
from minilora.cli import main
from minilora.export.stored import stored_factors
from minilora.proof import verify, verify_in
from minilora.store.adapter_files import read_adapter
from tests.gguf_llama import write_lora, write_model
from tests.models import CHATML, byte_tokenizer, lora, randomize
from tests.proof.conftest import adapted, base

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from tests.llama_cpp import serving

# GGUF of the base, GGUF of the adapter ("" for none), its scale: what is said, and the scale that is fitted.
CASES = {
    "right": ("F32", "own", 1.0, "right", 1.0),
    "in half precision": ("F16", "own", 1.0, "right", 1.0),
    "no adapter": ("F32", "", 1.0, "not applied", 0.0),
    "scale halved": ("F32", "own", 0.5, "scale", 0.5),
    "a scale between those that were measured": ("F32", "own", 0.8, "scale", 0.8),
    "another adapter": ("F32", "other", 1.0, "another adapter or base", None),
    "another base": ("other base", "own", 1.0, "another adapter or base", None),
    "another base without adapter": ("other base", "", 1.0, "another base", None),
    "another template": ("other template", "own", 1.0, "another template", 1.0),
    "q8_0": ("Q8_0", "own", 1.0, "another packing", 1.0),
    "q4_0": ("Q4_0", "own", 1.0, "another packing", 1.0),
    "q4_0 without adapter": ("Q4_0", "", 1.0, "not applied", 0.0),
    "q4_0 with the scale halved": ("Q4_0", "own", 0.5, "scale", 0.5),
    "down_proj left out": ("F32", "no down_proj", 1.0, "misread", None),
    "lora_alpha / r for rsLoRA": ("F32", "over r", 1.0, "misread", None),
}


@pytest.fixture(scope="module")
def files(sealed, tmp_path_factory):
    """A function that finds a GGUF by what it is, and writes it on first use."""
    place, tokenizer = tmp_path_factory.mktemp("gguf"), byte_tokenizer()

    def of(name):
        path = place / f"{name}.gguf"
        if path.exists() or not name:
            return path if name else None
        factors, config = stored_factors(read_adapter(sealed.folder), "llama.cpp"), base().config
        if name == "own":
            write_lora(factors, config, path)
        elif name == "other":
            adapted(5).save_pretrained(place / "other")
            write_lora(stored_factors(read_adapter(place / "other"), "llama.cpp"), config, path)
        elif name == "no down_proj":
            write_lora(factors, config, path, lambda layer: 0.0 if "down_proj" in layer else 1.0)
        elif name == "over r":
            write_lora(factors, config, path, lambda layer: 3**-0.5)
        elif name == "other base":
            write_model(base(7), tokenizer, path)
        elif name == "other template":
            write_model(base(), tokenizer, path, template=CHATML.replace("assistant\n", "assistant\n\n"))
        else:
            write_model(base(), tokenizer, path, name)
        return path

    return of


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_told_apart(sealed, files, name):
    model, adapter, scale, kind, fitted = CASES[name]
    with serving(files(model), files(adapter), scale, context=256) as url:
        found = verify(sealed.folder, url)
    assert found.kind == kind, found
    assert found.code == (kind != "right")
    assert fitted is None or abs(found.scale - fitted) < 0.06


def test_what_is_misread_is_named(sealed, files):
    with serving(files("F32"), files("no down_proj"), context=256) as url:
        assert "down_proj left out" in verify(sealed.folder, url).text
    with serving(files("F32"), files("over r"), context=256) as url:
        assert "lora_alpha / r in every layer" in verify(sealed.folder, url).text


def test_the_command_ends_with_the_verdicts_code(sealed, files, capsys):
    with serving(files("F32"), files("own"), context=256) as url:
        assert main(["verify", str(sealed.folder), "--server", f"{url}/v1/"]) == 0
        assert "applied right" in capsys.readouterr().out
    with serving(files("Q8_0"), files("own"), context=256) as url:
        assert main(["verify", str(sealed.folder), "--server", url]) == 1
        assert "another quantization of the same base" in capsys.readouterr().out
        assert main(["verify", str(sealed.folder), "--server", url, "--any-quantization"]) == 0
    assert main(["verify", str(sealed.folder), "--server", url, "--timeout", "5"]) == 2  # the server is gone
    assert capsys.readouterr().err.count("\n") == 1


def test_in_this_process(sealed, files):
    found = verify_in(sealed.folder, "llama.cpp", "", str(files("F32")), str(files("own")))
    assert (found.kind, found.code) == ("right", 0)
    assert verify_in(sealed.folder, "llama.cpp", "", str(files("F32")), str(files("other"))).code == 1


def test_in_this_process_the_lora_is_written_where_none_is_given(sealed, files, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["verify", str(sealed.folder), "--in", "llama.cpp", "--base", str(files("F32"))]) == 0
    assert "applied right" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["vera", "lora_xs", "lora_fa"])
def test_a_variant_is_sealed_and_verified(tmp_path, files, capsys, variant):
    """What hangs on its base gets it by --model, as when it is exported."""
    base().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = lora(["q_proj", "v_proj", "up_proj"])
    save_adapter(randomize(inject(base(), config, variant=variant), 3), tmp_path / "a")
    folder, given = str(tmp_path / "a"), ["--model", str(tmp_path / "base")]
    assert main(["seal", folder, *given, "--prompts", "hello there"]) == 0
    asked = ["verify", folder, "--in", "llama.cpp", "--base", str(files("F32"))]
    assert main([*asked, *given]) == 0 and "applied right" in capsys.readouterr().out
    if variant != "lora_fa":
        assert main(asked) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"a {variant} adapter depends on its base model; give it with --model" in said


def test_asking_leaves_the_server_as_it_was(sealed, files):
    """A scale that comes with a request stays in llama.cpp's cache of prompts, so none is sent: what others ask is answered as before."""
    ask = {"prompt": list(sealed.probe.questions[0].ids), "n_predict": 1, "n_probs": 5, "temperature": 0}
    with serving(files("F32"), files("own"), 0.5, context=256) as url:
        before, _ = likeliest(url, ask), verify(sealed.folder, url)
        assert likeliest(url, ask) == pytest.approx(before, abs=1e-4)


def likeliest(url, ask):
    """Token to log-probability, with the cache of prompts that a server has by itself."""
    from tests.llama_cpp import post

    (found,) = post(url, "/completion", **ask)["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}
