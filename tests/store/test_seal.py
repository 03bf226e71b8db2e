"""Files are data: what is damaged, foreign, oversized or of another base is refused by name, and loading does nothing but read."""

import hashlib
import json
import random
import resource
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from minilora import LoraConfig, MiniLoraError, PeftModel, QuantConfig, get_peft_model, inject, merge, quantize_model
from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError
from minilora.export.folders import export_adapter, export_folder
from minilora.files.parse import parse_header, parse_json
from minilora.many.hotswap import hotswap_adapter
from minilora.store.adapter_files import (
    CONFIG_FILE,
    SEAL_FILE,
    WEIGHTS_FILE,
    _seal_bytes,
    adapter_sha256,
    read_adapter,
    seal,
)
from minilora.store.fingerprint import differs, fingerprint, is_fingerprint
from minilora.store.load import adapter_state_dict, load_adapter, restore_adapter, save_adapter


def lora(**fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": ["c_attn"], **fields})


@pytest.fixture
def folder(make_gpt2, randomize, tmp_path):
    save_adapter(randomize(inject(make_gpt2(), lora())), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    content = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(content))


def unsealed(folder):
    (folder / SEAL_FILE).unlink()
    return folder


# ---- damage


def flips(folder, count, check):
    """Flip one random bit of one file at a time; ``check`` is called in between."""
    draw, files = random.Random(0), sorted(folder.iterdir())
    sizes = [file.stat().st_size for file in files]
    for _ in range(count):
        file = draw.choices(files, sizes)[0]
        raw = file.read_bytes()
        at = draw.randrange(len(raw))
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :])
        check(f"{file.name}, byte {at}")
        file.write_bytes(raw)


def test_a_thousand_bit_flips_are_all_refused(folder, make_gpt2, snapshot):
    model, refused = make_gpt2(), 0
    before = snapshot(model)

    def check(where):
        nonlocal refused
        with pytest.raises(CheckpointError, match=f"{folder}.*(sha256|damaged)"):
            read_adapter(folder)
        refused += 1

    flips(folder, 1_000, check)
    assert refused == 1_000
    load_adapter(model, folder)
    assert snapshot(model) != before


def test_bit_flips_of_a_file_without_a_seal_can_pass(folder):
    """Why there is a seal."""
    passed = 0

    def check(where):
        nonlocal passed
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_adapter(folder)
            passed += 1
        except MiniLoraError:
            pass

    flips(unsealed(folder), 100, check)
    assert passed > 20


@pytest.mark.parametrize("field", [{"lora_alpha": 13}, {"use_rslora": True}, {"base_model_name_or_path": "x"}])
def test_an_edited_config_is_refused_until_the_seal_is_removed(folder, make_gpt2, field):
    edit(folder, **field)
    with pytest.raises(CheckpointError, match=rf"{CONFIG_FILE}: is not the file that was saved.*delete {SEAL_FILE}"):
        load_adapter(make_gpt2(), folder)
    load_adapter(make_gpt2(), unsealed(folder))


def test_a_config_of_the_callers_needs_no_sealed_one(folder, make_gpt2):
    (folder / CONFIG_FILE).unlink()
    load_adapter(make_gpt2(), folder, config=lora())


SEALS = {
    "empty": b"",
    "no object": b"[]",
    "not JSON": b"{",
    "no fields": b"{}",
    "deep": b'{"files":' + b"[" * 100_000 + b"}",
}


@pytest.mark.parametrize("case", SEALS)
def test_a_broken_seal_is_named(folder, case):
    (folder / SEAL_FILE).write_bytes(SEALS[case])
    with pytest.raises(CheckpointError, match=rf"{SEAL_FILE}: damaged, or of a newer minilora"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "base", [1, {}, {"parameters": 1, "samples": {}}, {"parameters": "", "samples": {"a": ["f", "00"]}}]
)
def test_a_well_sealed_lie_about_the_base_is_damage(folder, base):
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    (folder / SEAL_FILE).write_bytes(seal(files, base)[SEAL_FILE])
    with pytest.raises(CheckpointError, match=rf"{SEAL_FILE}: damaged"):
        read_adapter(folder)


# ---- which adapter


def test_the_digest_is_what_sha256sum_prints(folder, make_gpt2):
    command = f"sha256sum {CONFIG_FILE} {WEIGHTS_FILE} | sha256sum"
    said = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True).stdout.split()[0]
    assert read_adapter(folder).sha256 == said
    assert save_adapter(inject(make_gpt2(), lora()), folder.with_name("other")) != said


def test_another_adapter_than_the_expected_one_is_refused(folder, make_gpt2, snapshot, tmp_path):
    digest, other = read_adapter(folder).sha256, "0" * 64
    load_adapter(make_gpt2(), folder, expect_sha256=digest.upper())
    PeftModel.from_pretrained(make_gpt2(), folder, expect_sha256=digest).load_adapter(folder, "b", expect_sha256=digest)
    export_folder(folder, tmp_path / "out", "mlx", expect_sha256=digest)
    model, carrying = make_gpt2(), get_peft_model(make_gpt2(), lora())
    for call in (
        lambda: load_adapter(model, folder, expect_sha256=other),
        lambda: PeftModel.from_pretrained(model, folder, expect_sha256=other),
        lambda: carrying.load_adapter(folder, "b", expect_sha256=other),
        lambda: hotswap_adapter(carrying, folder, expect_sha256=other),
        lambda: export_folder(folder, tmp_path / "no", "mlx", expect_sha256=other),
    ):
        before = snapshot(model), snapshot(carrying)
        with pytest.raises(CheckpointError, match=f"its sha256 is {digest}, expected {other}; this is another adapter"):
            call()
        assert before == (snapshot(model), snapshot(carrying))
    with pytest.raises(ConfigError, match="expect_sha256='abc': wanted 64 hexadecimal digits"):
        load_adapter(model, folder, expect_sha256="abc")


def test_the_commands_that_load_an_adapter_take_the_digest(folder, capsys, tmp_path):
    flags = ["--adapter", str(folder), "--expect-sha256", "0" * 64]
    assert main(["export", *flags, "--for", "mlx", "--out", str(tmp_path / "out")]) == 2
    assert "this is another adapter" in capsys.readouterr().err
    for command in ("generate", "merge", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert "--expect-sha256" in shown and "--allow-other-base" in shown


# ---- which base


def test_another_base_of_the_same_shapes_is_refused_unless_told(folder, make_gpt2, snapshot):
    model = make_gpt2(seed=1)
    before = snapshot(model)
    words = r"was trained on another base model .*transformer\.h\.\d\.attn\.c_attn\.weight holds .* remembers .*--allow-other-base"
    with pytest.raises(CheckpointError, match=words):
        load_adapter(model, folder)
    assert snapshot(model) == before
    load_adapter(model, folder, allow_other_base=True)


def test_a_merged_base_is_another_base(folder, make_gpt2):
    model = make_gpt2()
    load_adapter(model, folder)
    merge(model)
    plain = make_gpt2()
    for mine, merged in zip(plain.transformer.h, model.transformer.h, strict=True):
        mine.attn.c_attn.weight.data.copy_(merged.attn.c_attn.weight)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        load_adapter(plain, folder)


@pytest.mark.parametrize("fields", [{"n_positions": 64}, {"vocab_size": 80}, {"n_inner": 48}], ids=str)
def test_a_base_of_other_shapes_is_refused_where_the_adapter_would_fit(folder, make_gpt2, fields):
    with pytest.raises(CheckpointError, match="its parameters have other names or shapes"):
        load_adapter(make_gpt2(**fields), folder)
    load_adapter(make_gpt2(**fields), folder, allow_other_base=True)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_the_same_base_in_another_dtype_is_the_same_base(make_gpt2, tmp_path, before, after):
    save_adapter(inject(make_gpt2().to(before), lora()), tmp_path)
    load_adapter(make_gpt2().to(before).to(after), tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(make_gpt2(seed=1).to(after), tmp_path)


@pytest.mark.parametrize(
    "how", [QuantConfig(), QuantConfig(double_quant=True), QuantConfig("nf2"), QuantConfig("int8")], ids=str
)
def test_the_same_base_packed_is_the_same_base(make_llama, tmp_path, how):
    config = lora(target_modules=["q_proj", "down_proj"])
    save_adapter(inject(make_llama(), config), tmp_path / "dense")
    save_adapter(inject(quantize_model(make_llama(), how), config), tmp_path / "packed")
    for name in ("dense", "packed"):
        load_adapter(make_llama(), tmp_path / name)
        load_adapter(quantize_model(make_llama(), how), tmp_path / name)
    for base, name in ((make_llama(seed=1), "packed"), (quantize_model(make_llama(seed=1), how), "dense")):
        with pytest.raises(CheckpointError, match="its weights are not those that were packed"):
            load_adapter(base, tmp_path / name)


def test_exports_and_exchanges_remember_the_base_too(make_llama, randomize, tmp_path):
    made, folder = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}, tmp_path / "llama"
    model = randomize(inject(make_llama(), LoraConfig(**made)))
    save_adapter(model, folder)
    export_adapter(model, tmp_path / "one", "vllm")
    export_folder(folder, tmp_path / "two", "vllm")
    other = inject(make_llama(seed=1), LoraConfig(**made))
    for exported in (folder, tmp_path / "one", tmp_path / "two"):
        load_adapter(make_llama(), exported)
        for call in (lambda f: load_adapter(other, f, "second"), lambda f: hotswap_adapter(other, f)):
            with pytest.raises(CheckpointError, match="another base"):
                call(exported)
    with pytest.raises(CheckpointError, match="another base"):
        restore_adapter(other, folder)
    hotswap_adapter(other, folder, allow_other_base=True)


# ---- other programs


def test_peft_reads_a_sealed_folder_without_a_warning(folder, make_gpt2, ids):
    peft = pytest.importorskip("peft")
    ours = make_gpt2()
    load_adapter(ours, folder)
    theirs = peft.PeftModel.from_pretrained(make_gpt2(), folder)  # a warning is an error here
    assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-6)


def test_unknown_keys_are_refused_in_our_files_and_told_of_in_others(folder, make_gpt2):
    edit(unsealed(folder), lora_beta=2, another=None)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['another', 'lora_beta'\]"):
        report = load_adapter(make_gpt2(), folder)
    assert report.ignored_config_keys == ["another", "lora_beta"]
    with pytest.raises(ConfigError, match="unknown key 'another'"):
        LoraConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text()))


# ---- sizes, before memory is taken


def with_header(folder, header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return folder


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "11 MB": (b"{" + b" " * 11_000_000 + b"}", b"", "header of 11,000,002 bytes; at most 10,000,000 are read"),
    "70,000 tensors": ({f"t{i}": entry([0], 0, 0) for i in range(70_000)}, b"", "70,000 tensors; at most 65,536"),
    "a name twice": (
        b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2),
        b"1234",
        "key 'a' comes twice",
    ),
    "a field twice": (
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}',
        b"1234",
        "'dtype' comes twice",
    ),
    "a hole": ({"a": entry([1], 4, 8)}, b"12345678", "'a' begins at byte"),
    "an overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678", "'b' begins at byte"),
    "bytes over": ({"a": entry([1], 0, 4)}, b"12345678", "its tensors end at byte"),
    "bytes missing": ({"a": entry([4], 0, 16)}, b"1234", "its tensors end at byte"),
    "size and shape": ({"a": entry([3], 0, 4)}, b"1234", "data_offsets span 4 bytes, dtype and shape mean 12"),
    "a huge shape": ({"a": entry([2**40] * 3, 0, 4)}, b"1234", "shape is larger than any tensor"),
    "a negative size": ({"a": entry([-1], 0, 4)}, b"1234", "shape is no list of sizes"),
    "a size of true": ({"a": entry([True], 0, 4)}, b"1234", "shape is no list of sizes"),
    "three offsets": ({"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 4]}}, b"1234", "no two offsets"),
    "17 dimensions": ({"a": entry([1] * 17, 0, 4)}, b"1234", "shape is no list of sizes"),
    "8-bit floats": ({"a": entry([4], 0, 4, "F8_E4M3")}, b"1234", "dtype 'F8_E4M3' is not one of F64"),
    "a field more": ({"a": entry([1], 0, 4) | {"code": "os"}}, b"1234", "wanted exactly dtype, shape and data_offsets"),
    "two lines": ({"a\nb": entry([1], 0, 4)}, b"1234", "signs that cannot be printed"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is no object of texts"),
    "a list": (b"[1]", b"", r"header does not begin with \{"),
    "deep": (b'{"a":' + b"[" * 200_000, b"", "nested too deeply"),
    "twenty deep": (b'{"a":' + b"[" * 25 + b"]" * 25 + b"}", b"", "nested too deeply"),
    "not UTF-8": (b'{"\xff": 1}', b"", "utf-8"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(folder, make_gpt2, snapshot, case):
    header, body, words = HEADERS[case]
    model = make_gpt2()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_FILE}: damaged .*{words}.*copy or save it again") as caught:
        load_adapter(model, with_header(unsealed(folder), header, body))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1_000
    assert snapshot(model) == before


def test_our_reader_and_safetensors_agree(tmp_path):
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64]
    tensors = {str(kind): (torch.arange(15) % 2).to(kind).view(3, 5) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 4), "one": torch.tensor(1.5)}
    safetensors.torch.save_file(tensors, tmp_path / "x", {"format": "pt"})
    from minilora.files.parse import parse_tensors

    found, metadata = parse_tensors(bytearray((tmp_path / "x").read_bytes()), "x")
    assert metadata == {"format": "pt"} and found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_tensors_that_lie_oddly_are_read(tmp_path):
    from minilora.files.parse import parse_tensors

    raw = json.dumps({"a": entry([1], 1, 5), "b": entry([1], 0, 1, "U8")}).encode()
    found, _ = parse_tensors(bytearray(struct.pack("<Q", len(raw)) + raw + b"\7" + struct.pack("<f", 2.5)), "x")
    assert found["a"].item() == 2.5 and found["b"].item() == 7


@pytest.mark.parametrize("changes", [{"r": 2_000_000}, {"rank_pattern": {"c_attn": 2_000_000}}], ids=str)
def test_a_rank_that_the_file_does_not_have_takes_no_memory(folder, make_gpt2, snapshot, changes):
    edit(unsealed(folder), **changes)
    model = make_gpt2()
    before, used = snapshot(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        CheckpointError, match=r"the config says r=2000000 for .*c_attn, and no tensor of the file has that rank"
    ):
        load_adapter(model, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 64_000  # KiB
    assert snapshot(model) == before


def test_a_long_config_is_refused(folder):
    (unsealed(folder) / CONFIG_FILE).write_bytes(b'{"r": ' + b" " * 10_000_000 + b"8}")
    with pytest.raises(CheckpointError, match="10,000,008 bytes of JSON; at most 10,000,000 are read"):
        read_adapter(folder)


def test_duplicate_keys_of_a_config_are_refused(folder):
    (unsealed(folder) / CONFIG_FILE).write_text('{"r": 3, "r": 4}')
    with pytest.raises(CheckpointError, match="key 'r' comes twice"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match="key 'r' comes twice"):
        LoraConfig.from_pretrained(folder)


# ---- nothing but reading


CLEAN_LOAD = """
    import json, sys
    import torch
    from minilora import LoraConfig, inject, load_adapter, save_adapter

    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 5))

    save_adapter(inject(base(), LoraConfig(r=3, lora_alpha=12, target_modules=["0", "1"])), sys.argv[1])
    load_adapter(base(), sys.argv[1])  # what Python loads on first use is loaded now
    model, events = base(), []
    watching = True
    sys.addaudithook(lambda event, arguments: events.append((event, str(arguments[:1]))) if watching else None)
    load_adapter(model, sys.argv[1])
    watching = False
    print(json.dumps(events))
"""


def test_a_clean_load_only_opens_files(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CLEAN_LOAD), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    events = json.loads(done.stdout)
    harmless = {
        "object.__getattr__",
        "object.__setattr__",
        "object.__delattr__",
        "sys._getframe",
        "builtins.id",
    }  # of Python itself
    assert {name for name, _ in events} - harmless == {"open", "os.listdir"}, [
        e for e in events if e[0] not in harmless
    ][:10]
    opened = [path.strip("(',)") for name, path in events if name == "open"]
    files = [Path(path).name for path in opened if not path.isdigit()]  # a number is a file that is open already
    assert sorted(files) == [CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE]


# ---- all or nothing


def test_a_load_that_fails_at_any_layer_changes_nothing(folder, make_gpt2, snapshot, monkeypatch):
    from minilora.lora.layer import LoRALinear

    plain, model = LoRALinear.__init__, make_gpt2()
    before = snapshot(model)
    for layer in range(2):
        built = []

        def init(self, *arguments, built=built, layer=layer, **named):
            if len(built) == layer:
                raise MemoryError("no room")
            built.append(1)
            plain(self, *arguments, **named)

        monkeypatch.setattr(LoRALinear, "__init__", init)
        with pytest.raises(MemoryError):
            load_adapter(model, folder)
        with pytest.raises(MemoryError):
            PeftModel.from_pretrained(model, folder)
        assert snapshot(model) == before and not hasattr(model, "_minilora_adapters")
    monkeypatch.undo()
    load_adapter(model, folder)


def test_a_placement_that_fails_at_any_layer_changes_nothing(folder, make_gpt2, randomize, snapshot, monkeypatch):
    from minilora.lora.slot import Slot

    plain = Slot.show
    for first in (False, True):
        model = make_gpt2()
        if not first:
            randomize(inject(model, lora(target_modules=["c_fc"])))
        before = snapshot(model)
        for slot in range(1, 5):
            calls = []

            def show(self, change, names, folded=(), parent=None, calls=calls, slot=slot):
                calls.append(list(names))
                if len([c for c in calls if "second" in c]) == slot:
                    calls.clear()
                    raise RuntimeError("broken")
                plain(self, change, names, folded, parent)

            monkeypatch.setattr(Slot, "show", show)
            try:
                load_adapter(model, folder, "second")
            except RuntimeError:
                monkeypatch.setattr(Slot, "show", plain)
                assert snapshot(model) == before
                assert first or list(model._minilora_adapters.configs) == ["default"]
            else:
                break


@pytest.mark.parametrize("how", [restore_adapter, hotswap_adapter])
def test_an_exchange_that_stops_at_any_tensor_changes_nothing(folder, make_gpt2, randomize, snapshot, monkeypatch, how):
    model = randomize(inject(make_gpt2(), lora()), 7)
    before, plain, failed = snapshot(model), torch.Tensor.copy_, 0
    for at in range(1, 6):
        calls = []

        def copy(self, *rest, calls=calls, at=at, **named):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return plain(self, *rest, **named)

        watched = {id(tensor) for tensor in adapter_state_dict(model).values()}
        assert len(watched) == 4
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        try:
            how(model, folder)
        except KeyboardInterrupt:
            monkeypatch.setattr(torch.Tensor, "copy_", plain)
            assert snapshot(model) == before
            failed += 1
        monkeypatch.setattr(torch.Tensor, "copy_", plain)
    assert failed >= 1


def test_a_failed_save_leaves_model_and_folder(folder, make_gpt2, randomize, snapshot, monkeypatch):
    from minilora.files import disk
    from minilora.files.disk import Disk

    model = randomize(inject(make_gpt2(), lora()), 5)
    before, files = snapshot(model), {file.name: file.read_bytes() for file in folder.iterdir()}
    tensors = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}

    class Full(Disk):
        def write(self, path, content):
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(disk, "used", Full())
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\).*room \([\d,]+ bytes\)"):
        save_adapter(model, folder)
    assert snapshot(model) == before and {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert all(torch.equal(tensors[key], tensor) for key, tensor in adapter_state_dict(model).items())


def test_json_and_headers_take_any_bytes_like():
    assert parse_json(bytearray(b'{"a": 1}')) == {"a": 1}
    assert parse_header(struct.pack("<Q", 2) + b"{}", "x").entries == {}
    assert adapter_sha256({}) == adapter_sha256({})


# ---- fingerprints


def test_a_layer_whose_weight_is_not_at_hand_is_left_out(make_gpt2):
    paths = [f"transformer.h.{at}.attn.c_attn" for at in range(2)]
    want = fingerprint(make_gpt2(), paths)
    assert set(want["samples"]) == set(paths) and is_fingerprint(want)
    model = make_gpt2()
    model.transformer.h[0].attn.c_attn.to("meta")
    found = fingerprint(model, paths)
    assert found["parameters"] == want["parameters"] and set(found["samples"]) == {paths[1]}
    assert differs(want, found) is None and differs(found, want) is None
    model.transformer.h[1].attn.c_attn.weight.data += 1
    assert "h.1.attn.c_attn.weight holds" in differs(want, fingerprint(model, paths))


def test_of_many_layers_eight_are_sampled_from_first_to_last(make_gpt2):
    model = make_gpt2(n_layer=11)
    paths = [f"transformer.h.{at:d}.mlp.c_fc" for at in range(11)]
    for count, sampled in ((8, 8), (9, 8), (11, 8), (3, 3)):
        samples = fingerprint(model, paths[::-1][:count])["samples"]
        assert len(samples) == sampled and min(samples) == min(paths[::-1][:count])


@pytest.mark.parametrize(
    "value",
    [
        None, [], {"parameters": ""}, {"parameters": "", "samples": {}, "more": 1}, {"parameters": "", "samples": []},
        {"parameters": "", "samples": {"a": None}}, {"parameters": "", "samples": {"a": ["float32"]}},
        {"parameters": "", "samples": {"a": ["int8", "0" * 128]}}, {"parameters": "", "samples": {"a": ["float32", "0" * 127]}},
        {"parameters": "", "samples": {"a": ["float32", 0]}}, {"parameters": "", "samples": {"a": ["packed", "G" * 128]}},
    ],
)  # fmt: skip
def test_what_is_no_fingerprint(value):
    assert not is_fingerprint(value)
    assert is_fingerprint({"parameters": "", "samples": {"a": ["packed", "0" * 128]}})


def test_two_adapters_of_a_folder_have_two_digests(folder):
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    digest = adapter_sha256(files)
    assert digest == adapter_sha256(dict(reversed(files.items()))) == adapter_sha256(files | {"README.md": b"mine"})
    for name in files:
        assert adapter_sha256(files | {name: files[name] + b" "}) != digest
        assert adapter_sha256({key: files[key] for key in files if key != name}) != digest


def reseal(folder, **changes):
    """A seal whose own hash is right, with other content."""
    content = json.loads((folder / SEAL_FILE).read_text()) | changes
    (folder / SEAL_FILE).write_bytes(_seal_bytes(content))


def test_a_seal_of_another_version_or_of_no_file_is_refused(folder):
    reseal(folder)
    read_adapter(folder)
    for changes, words in (
        ({"version": 2}, f"{SEAL_FILE}: damaged, or of a newer minilora"),
        ({"files": {}}, f"{CONFIG_FILE}: is not the file that was saved here"),
        ({"files": []}, f"{CONFIG_FILE}: is not the file that was saved here"),
        ({"files": 3}, f"{SEAL_FILE}: damaged, or of a newer minilora"),
    ):
        before = (folder / SEAL_FILE).read_bytes()
        reseal(folder, **changes)
        with pytest.raises(CheckpointError, match=words):
            read_adapter(folder)
        (folder / SEAL_FILE).write_bytes(before)
    reseal(folder, base=None)
    assert read_adapter(folder).base is None


def test_a_pickle_beside_good_weights_is_left_alone(folder):
    (folder / "adapter_model.bin").write_bytes(b"never read")
    read_adapter(folder)


def test_what_is_read_says_where_it_comes_from(folder):
    stored = read_adapter(folder)
    assert stored.from_file and stored.variant == "lora" and stored.ignored == [] and stored.made_with == ""
    assert stored.path == folder / WEIGHTS_FILE and stored.config.r == 3
    given = read_adapter(folder, lora(r=5))
    assert not given.from_file and given.config.r == 5 and given.base == stored.base and stored.base


GOLDEN = """{
 "base": null,
 "files": {
  "adapter_config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
  "adapter_model.safetensors": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
 },
 "sha256": "SUM",
 "version": 1
}
"""


def test_a_seal_keeps_its_form():
    """One of today is read by every later version: its own hash is that of the other fields in order, as json.dumps writes them."""
    written = seal({WEIGHTS_FILE: b"1", CONFIG_FILE: b"{}"}, None)[SEAL_FILE].decode()
    body = json.loads(GOLDEN)
    del body["sha256"]
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    assert written == GOLDEN.replace("SUM", own)
    swapped = json.dumps({"samples": {}, "parameters": "x"})
    other = seal({WEIGHTS_FILE: b"1", CONFIG_FILE: b"{}"}, json.loads(swapped))[SEAL_FILE]
    assert other == seal({CONFIG_FILE: b"{}", WEIGHTS_FILE: b"1"}, {"parameters": "x", "samples": {}})[SEAL_FILE]


def test_what_is_not_finite_is_found_without_a_model(make_gpt2, folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    last = sorted(tensors)[-1]
    tensors[last][-1, -1] = float("inf")
    safetensors.torch.save_file(tensors, unsealed(folder) / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE}: {last} holds NaN or infinity"):
        read_adapter(folder)


def test_the_warning_of_unknown_keys_points_at_the_caller_and_cuts_them(make_gpt2, folder):
    edit(unsealed(folder), **{"x" * 70: 1})
    with pytest.warns(UserWarning, match=rf"arguments \['{'x' * 60}'\] for") as caught:
        load_adapter(make_gpt2(), folder)
    assert caught[0].filename == __file__
