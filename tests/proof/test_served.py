"""``minilora verify`` beside a real llama.cpp server on loopback: every case that it tells apart."""

import pytest

from minilora import inject, save_adapter
from minilora.cli import main
from minilora.proof import verify, verify_in
from tests.models import byte_tokenizer, lora, randomize
from tests.proof.conftest import base
from tests.proof.servings import SERVINGS, written

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from tests.llama_cpp import serving


@pytest.fixture(scope="module")
def files(sealed, tmp_path_factory):
    """A function that finds a GGUF by what it is, and writes it on first use."""
    place = tmp_path_factory.mktemp("gguf")
    return lambda name: written(name, sealed.folder, place)


@pytest.mark.parametrize("name", SERVINGS)
def test_each_case_is_told_apart(sealed, files, name):
    case = SERVINGS[name]
    with serving(files(case.base), files(case.adapter), case.scale, context=256) as url:
        found = verify(sealed.folder, url)
    assert found.kind == case.kind, found
    assert found.code == (case.kind != "right")
    assert case.fitted is None or abs(found.scale - case.fitted) < 0.06


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
