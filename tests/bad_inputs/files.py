"""Rows about files: adapter folders that are damaged or another model's, packed weights, training data, and places that cannot be written."""

# ruff: noqa: E501  (a row is one line)

import json
import struct

import safetensors.torch
import torch

import minilora
from minilora import LoraConfig, PeftModel, QuantConfig, hotswap_adapter, load_adapter, quantize, save_adapter
from minilora.data.encoding import encode_all
from minilora.data.records import look_at, read, read_jsonl
from minilora.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    QuantizationError,
    StateError,
    TargetError,
    WriteError,
)
from minilora.export.folders import export_adapter, export_folder
from minilora.hf.packed import load_packed, save_packed
from minilora.peft import set_peft_model_state_dict
from minilora.quant.bnb import from_bitsandbytes, to_bitsandbytes
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.training.left import claim

NAN = float("nan")
FIRST = "base_model.model.first.lora_A.weight"


# ---- adapter folders: (label, what is done to the folder, type, thing, way)


def loads(damage, sealed=False, **options):
    """A call that damages a good folder, takes its seal away unless it is what is looked at, and loads it."""

    def call(w):
        folder = w.folder()
        if not sealed:
            (folder / SEAL_FILE).unlink()
        damage(folder)
        load_adapter(w.plain, folder, **options)

    return call


def nothing(folder):
    pass


def gone(name):
    return lambda folder: (folder / name).unlink()


def bytes_of(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def tensors(change, metadata=None):
    """The weights file with its tensors changed; ``change`` gets the dict."""

    def do(folder):
        held = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        held = change(held) or held
        (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(held, metadata or {"format": "pt"}))

    return do


def less(held):
    del held[FIRST]


def config(**fields):
    def do(folder):
        content = json.loads((folder / CONFIG_FILE).read_text()) | fields
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return do


def header(entries, data=b"", length=None):
    """A weights file of this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    raw = struct.pack("<Q", len(text) if length is None else length) + text + data
    return bytes_of(WEIGHTS_FILE, lambda old: raw)


def one(**fields):
    return {FIRST: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}


def only_pickle(folder):
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")


W, C, S = WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE
LOAD = [
    ("no folder", lambda w: load_adapter(w.plain, w.tmp / "nowhere"), CheckpointError, "nowhere: no such folder", f"wanted one with {C}"),
    ("a file", lambda w: load_adapter(w.plain, __file__), CheckpointError, "files.py", "wanted one with"),
    ("no weights", loads(gone(W)), CheckpointError, W, "; "),
    ("no config", loads(gone(C)), CheckpointError, C, "; "),
    ("a pickle", loads(only_pickle), CheckpointError, "adapter_model.bin", "save_pretrained it again"),
    ("no weights, sealed", loads(gone(W), sealed=True), CheckpointError, W, "; "),
    *((f"weights {label}", loads(bytes_of(W, change)), CheckpointError, f"{W}: damaged", "copy or save it again") for label, change in (
        ("cut", lambda raw: raw[:-5]), ("longer", lambda raw: raw + b"\0" * 7), ("empty", lambda raw: b""), ("of zeros", lambda raw: bytes(500)),
        ("of 7 bytes", lambda raw: raw[:7]), ("of text", lambda raw: b"version https://git-lfs.github.com/spec/v1\n" * 9), ("with a cut header", lambda raw: raw[:40]),
    )),
    *((f"header: {label}", loads(header(*made)), CheckpointError, said, "copy or save it again") for label, made, said in (
        ("length lies", (b"{}", b"", 10**15), "at most 10,000,000"), ("past the end", (b"{}", b"", 99), "goes past the end"), ("a list", (b"[]",), "does not begin with {"),
        ("not JSON", (b"{x}",), "Expecting"), ("twice", (b'{"a":1,"a":2}',), "'a' comes twice"), ("dtype", (one(dtype="F8"), bytes(8)), "dtype 'F8'"),
        ("shape", (one(shape=[-2]), bytes(8)), "shape is no list of sizes"), ("offsets", (one(data_offsets=[0, 4]), bytes(8)), "span 4 bytes"),
        ("hole", (one(data_offsets=[8, 16]), bytes(16)), "begins at byte"), ("more", (one(), bytes(16)), "end at byte"), ("keys", (one(extra=1), bytes(8)), "wanted exactly dtype"),
        ("metadata", ({"__metadata__": {"a": 1}},), "__metadata__"), ("huge shape", (one(shape=[2**50]), bytes(8)), "shape is no list"),
    )),
    ("no tensor", loads(header({})), CheckpointError, "holds no tensor", "save the adapter again"),
    *((f"config {label}", loads(bytes_of(C, lambda raw, text=text: text)), CheckpointError, f"{C}: not JSON", "save the adapter again") for label, text in (
        ("cut", b'{"r": 3,'), ("empty", b""), ("a list", b"[1]"), ("latin-1", b'{"r": "\xfc"}'), ("twice", b'{"r": 3, "r": 4}'), ("deep", b'{"a":' * 99 + b"1" + b"}" * 99), ("null", b"null"),
    )),
    ("config of another kind", loads(config(peft_type="IA3")), ConfigError, f"{C}: peft_type='IA3'", "'LORA'"),
    ("config r", loads(config(r="3")), ConfigError, f"{C}: r='3'", "set r=8"),
    ("config alpha NaN", loads(config(lora_alpha=NAN)), ConfigError, f"{C}: lora_alpha=nan", "finite number > 0"),
    ("config dropout", loads(config(lora_dropout=[0.1])), ConfigError, f"{C}: lora_dropout=[0.1]", "0.05"),
    ("config huge r", loads(config(r=2_000_000)), CheckpointError, "r=2000000", "export the adapter again"),
    ("config r larger", loads(config(r=4)), CheckpointError, "is [3, 12]", "want [4, 12]"),
    ("config too few", loads(config(target_modules=["first"])), CheckpointError, "mid", "target_modules too short?"),
    ("config too many", loads(config(target_modules=["first", "mid", "last"])), CheckpointError, "last", "wrong base model or config?"),
    ("config typo", loads(config(target_modules=["frist", "mid"])), TargetError, "'frist'", "'first'"),
    ("config regex rank", loads(config(rank_pattern={"f.*": 3})), CheckpointError, "rank_pattern key 'f.*'", "write module names"),
    ("config other start", loads(config(use_dora=True)), CheckpointError, "lora_magnitude_vector", "wrong base model or config?"),
    ("variant unknown", loads(tensors(lambda t: None, {"minilora_variant": "gatde"})), ConfigError, "'gatde'", "import its module first"),
    ("NaN", loads(tensors(lambda t: {**t, FIRST: t[FIRST] * NAN})), CheckpointError, f"{FIRST} holds NaN", "; "),
    ("whole numbers", loads(tensors(lambda t: {**t, FIRST: t[FIRST].long()})), CheckpointError, f"{FIRST} is torch.int64", "wanted float32"),
    ("float64", loads(tensors(lambda t: {**t, FIRST: t[FIRST].double()})), CheckpointError, f"{FIRST} is torch.float64", "wanted float32"),
    ("one tensor less", loads(tensors(less)), CheckpointError, FIRST, "wrong base model or config?"),
    ("one tensor more", loads(tensors(lambda t: {**t, FIRST.replace("first", "extra"): t[FIRST].clone()})), CheckpointError, "extra", "wrong base model"),
    ("another shape", loads(tensors(lambda t: {**t, FIRST: t[FIRST][:, :5].contiguous()})), CheckpointError, "is [3, 5]", "want [3, 12]"),
    ("foreign names", loads(tensors(lambda t: {"w": t[FIRST]})), CheckpointError, "tensor 'w'", "PEFT's layout?"),
    ("seal damaged", loads(bytes_of(S, lambda raw: raw[:-9]), sealed=True), CheckpointError, f"{S}: damaged", "copy the folder again"),
    ("seal of nothing", loads(bytes_of(S, lambda raw: b"{}"), sealed=True), CheckpointError, f"{S}: damaged", "copy the folder again"),
    ("config edited", loads(config(lora_alpha=99), sealed=True), CheckpointError, f"{C}: is not the file", f"delete {S}"),
    ("weights edited", loads(tensors(lambda t: {**t, FIRST: t[FIRST] + 1}), sealed=True), CheckpointError, f"{W}: is not the file", f"delete {S}"),
    ("digest of another", loads(nothing, expect_sha256="0" * 64), CheckpointError, "expected 0000", "this is another adapter"),
    ("no digest", loads(nothing, expect_sha256="abc"), ConfigError, "expect_sha256='abc'", "64 hexadecimal digits"),
    ("a bad name", loads(nothing, adapter_name="../x"), StateError, "'../x'", "1 to 64 letters"),
    ("a taken name", lambda w: load_adapter(w.adapted, w.folder(), "other"), StateError, "'other' already", "another name"),
    ("into one of another rank", lambda w: w.adapted.load_adapter(w.folder(), "other"), CheckpointError, "= (3, 12, False) as lora, the adapter (2, 12, False)", "the config that it was saved with"),
    ("another base", lambda w: load_adapter(w.make_mlp(1), w.folder()), CheckpointError, "another base model", "allow_other_base=True"),
    ("another architecture", lambda w: load_adapter(w.llama, w.folder()), TargetError, "'first'", "closest names"),
    ("a name as model", lambda w: load_adapter("smollm2", w.folder()), StateError, "the model is a str", "wanted a torch module"),
    ("over an adapter", lambda w: PeftModel.from_pretrained(w.adapted, w.folder(), config=LoraConfig()), StateError, "['default', 'other'] already", "leave out config="),
]  # fmt: skip


# ---- exchange, export, save


def swap(into, **fields):
    """Exchange the adapter of the world's model ``into`` (a call) with a folder of this config."""
    return lambda w: hotswap_adapter(into(w), w.folder(**fields))


def exports(target, *targets, **fields):
    return lambda w: export_adapter(w.with_adapter(*targets, **fields), w.tmp / "out", target)


def folder_for(damage, target="vllm", **fields):
    def call(w):
        folder = w.folder(**fields)
        (folder / SEAL_FILE).unlink()
        damage(folder)
        export_folder(folder, w.tmp / "out", target)

    return call


def _over_a_file(w):
    (w.tmp / "file").write_text("kept")
    save_adapter(w.adapted, w.tmp / "file")


def state(change, **options):
    def call(w):
        given = {key: tensor.clone() for key, tensor in minilora.get_peft_model_state_dict(w.adapted).items()}
        change(given)
        set_peft_model_state_dict(w.adapted, given, **options)

    return call


WRITE = [
    ("swap without adapters", swap(lambda w: w.plain), StateError, "MLP has no adapters", "get_peft_model"),
    ("swap nobody", lambda w: hotswap_adapter(w.adapted, w.folder(), "fr"), StateError, "'fr'", "there are 'default'"),
    ("swap a merged one", swap(lambda w: w.merged), StateError, "'default' is merged", "unmerge first"),
    ("swap from nowhere", lambda w: hotswap_adapter(w.adapted, w.tmp / "x"), CheckpointError, "x: no such folder", "wanted one with"),
    ("swap in a larger rank", swap(lambda w: w.adapted, r=5), CheckpointError, "has rank 5, the present adapter 3", "start from the largest rank"),
    ("swap in other layers", swap(lambda w: w.with_adapter("last")), CheckpointError, "first", "load_adapter"),
    ("swap in DoRA", swap(lambda w: w.adapted, use_dora=True), CheckpointError, "DoRA", "load_adapter"),
    ("swap out a copy", swap(lambda w: w.with_adapter(modules_to_save=["last"])), CheckpointError, "has a Linear at last", "use load_adapter"),
    ("swap in a bias", swap(lambda w: w.adapted, lora_bias=True), CheckpointError, "differs in lora_bias", "load_adapter"),
    ("swap on another base", lambda w: hotswap_adapter(minilora.inject(w.make_mlp(1), LoraConfig(r=3, target_modules=["first", "mid"])), w.folder()), CheckpointError, "another base model", "allow_other_base=True"),
    ("export to a new program", exports("ollama"), ConfigError, "'ollama'", "'vllm'".strip("'")),
    ("export to None", exports(None), ConfigError, "None", "wanted one of vllm"),
    ("export DoRA", exports("vllm", use_dora=True), StateError, "first", "merge it instead"),
    ("export a copy", exports("mlx", "first", modules_to_save=["last"]), StateError, "last: mlx cannot hold", "merge the adapter"),
    ("export a bias", exports("vllm", bias="lora_only"), StateError, "bias", "merge the adapter"),
    ("export a table", lambda w: export_adapter(minilora.inject(w.llama, LoraConfig(r=2, target_modules=["embed_tokens"])), w.tmp / "out", "llama.cpp"), StateError, "embed_tokens: llama.cpp takes", "merge this one"),
    ("export NaN", lambda w: export_adapter(w.poisoned(), w.tmp / "out", "vllm"), StateError, "first: its scaled factors hold NaN", "load an earlier save"),
    ("export nobody", lambda w: export_adapter(w.adapted, w.tmp / "out", "vllm", "fr"), StateError, "'fr'", "there are 'default'"),
    ("export from nowhere", lambda w: export_folder(w.tmp / "x", w.tmp / "out", "vllm"), CheckpointError, "x: no such folder", "wanted one with"),
    ("export a DoRA folder", folder_for(nothing, use_dora=True), StateError, "DoRA rescales every row", "minilora merge makes a whole model"),
    ("export half a pair", folder_for(tensors(less)), StateError, "first has only one of", "save the adapter again"),
    ("export another rank", folder_for(config(r=4)), CheckpointError, "first has rank 3, the config says 4", "save it again"),
    ("export a strange tensor", folder_for(tensors(lambda t: {**t, "base_model.model.x.bias": t[FIRST].clone()})), StateError, "x.bias is no factor", "merge instead"),
    ("save without adapters", lambda w: save_adapter(w.plain, w.tmp / "out"), StateError, "MLP has no adapters", "get_peft_model"),
    ("save nobody", lambda w: save_adapter(w.adapted, w.tmp / "out", "fr"), StateError, "'fr'", "there are 'default'"),
    ("save NaN", lambda w: save_adapter(w.poisoned(), w.tmp / "out"), StateError, "adapter 'default' holds NaN or infinity in base_model.model.first", "save an earlier step"),
    ("save over a file", _over_a_file, WriteError, "file", "choose a writable folder"),
    ("save where nobody can", lambda w: save_adapter(w.adapted, "/proc/adapter"), WriteError, "/proc", "choose a writable folder"),
    ("save a pickle", lambda w: w.adapted.save_pretrained(w.tmp / "out", safe_serialization=False), StateError, "safe_serialization=False", "leave it True"),
    ("save some of nobody", lambda w: w.adapted.save_pretrained(w.tmp / "out", selected_adapters=["default", "fr"]), StateError, "'fr'", "there are 'default'"),
    ("a state with less", state(lambda t: t.pop(FIRST)), CheckpointError, FIRST, "wrong base model or config?"),
    ("a state with more", state(lambda t: t.update(x=t[FIRST])), CheckpointError, "x is unexpected", "wrong base model"),
    ("a state of another shape", state(lambda t: t.update({FIRST: t[FIRST].T})), CheckpointError, "is [12, 3]", "want [3, 12]"),
    ("a state of whole numbers", state(lambda t: t.update({FIRST: t[FIRST].int()})), CheckpointError, "torch.int32", "wanted float32"),
    ("a state for nobody", state(lambda t: None, adapter_name="fr"), StateError, "'fr'", "there are 'default'"),
]  # fmt: skip


# ---- packed weights and models

STATE = ".quant_state.bitsandbytes__nf4"


def bnb(change, double=True, said=None):
    """Read a packed weight after ``change`` of its tensors; ``said`` are new fields of its state."""

    def call(w):
        held = to_bitsandbytes(quantize(torch.linspace(-1, 1, 320).view(5, 64), QuantConfig(double_quant=double)))
        if said is not None:
            content = json.loads(bytes(held[STATE].tolist())) | said
            held[STATE] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
        if change:
            change(held)
        from_bitsandbytes(held, "w")

    return call


def put(name, tensor):
    return lambda held: held.update({name: tensor})


def packed_folder(change):
    def call(w):
        place = w.tmp / "packed"
        save_packed(minilora.quantize_model(w.llama), place)
        change(place)
        load_packed(str(place), torch.float32)

    return call


def packed_tensors(change):
    def do(folder):
        held = safetensors.torch.load_file(folder / "model.safetensors")
        change(held)
        safetensors.torch.save_file(held, folder / "model.safetensors")

    return do


Q0 = "model.layers.0.self_attn.q_proj.weight"
BNB = [
    ("no state", bnb(lambda t: t.pop(STATE)), CheckpointError, "w: has 0 quant_state", "wanted one"),
    ("two states", bnb(put(".quant_state.bitsandbytes__fp4", torch.zeros(1, dtype=torch.uint8))), CheckpointError, "w: has 2 quant_state", "wanted one"),
    ("a state of text", bnb(put(STATE, torch.tensor(list(b"{x"), dtype=torch.uint8))), CheckpointError, f"w{STATE}: is not JSON", "; "),
    ("a state of floats", bnb(put(STATE, torch.zeros(9))), CheckpointError, f"w{STATE}: is no quant_state", "; "),
    ("a long state", bnb(put(STATE, torch.zeros(20_000, dtype=torch.uint8))), CheckpointError, f"w{STATE}: is no quant_state", "; "),
    ("a list as state", bnb(put(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8))), CheckpointError, f"w{STATE}: is not JSON (holds a list", "; "),
    *((f"state {said}", bnb(None, said=said), CheckpointError, f"w{STATE}: ", "is not a state that minilora reads") for said in (
        {"blocksize": 0}, {"blocksize": "64"}, {"shape": [320]}, {"shape": [-5, 64]}, {"shape": [True, 64]}, {"dtype": "float8"}, {"quant_type": "fp4"}, {"nested_blocksize": 64},
        {"nested_offset": NAN}, {"nested_offset": None}, {"dtype": ["float32"]},
    )),
    ("another shape", bnb(None, said={"shape": [6, 64]}), CheckpointError, "w: holds 160 bytes of codes", "the file is damaged"),
    ("another blocksize", bnb(None, said={"blocksize": 128}), CheckpointError, "w.absmax: holds 5 scales", "the file is damaged"),
    ("codes cut", bnb(lambda t: t.update({"": t[""][:-1]})), CheckpointError, "w: holds 159 bytes", "the file is damaged"),
    ("scales cut", bnb(lambda t: t.update({".absmax": t[".absmax"][:-1]})), CheckpointError, "w.absmax: holds 4 scales", "the file is damaged"),
    ("no scales", bnb(lambda t: t.pop(".absmax")), CheckpointError, "w.absmax: is missing", "incomplete"),
    ("no scales of scales", bnb(lambda t: t.pop(".nested_absmax")), CheckpointError, "w.nested_absmax: is missing", "incomplete"),
    ("NaN in scales", bnb(put(".absmax", torch.full((5,), NAN)), double=False), CheckpointError, "w.absmax: holds NaN", "; "),
    ("NaN in scales of scales", bnb(put(".nested_absmax", torch.full((1,), NAN))), CheckpointError, "w.nested_absmax: holds NaN", "; "),
    ("scales that are not nested", bnb(put(".absmax", torch.ones(5))), CheckpointError, "w.absmax: is torch.float32", "wanted uint8"),
    ("another table", bnb(put(".quant_map", torch.zeros(16))), CheckpointError, "w.quant_map: is not the table", "; "),
    ("a short table", bnb(put(".quant_map", torch.zeros(3))), CheckpointError, "w.quant_map: holds 3 levels", "the file is damaged"),
    ("another nested table", bnb(put(".nested_quant_map", torch.zeros(256))), CheckpointError, "w.nested_quant_map: is not", "; "),
    ("a format of ours", lambda w: to_bitsandbytes(quantize(torch.ones(4, 64), QuantConfig("nf3"))), QuantizationError, "nf3", "it stores nf4 and fp4"),
    ("a small block", lambda w: to_bitsandbytes(quantize(torch.ones(4, 64), QuantConfig(blocksize=32))), QuantizationError, "blocksize 32", "it stores nf4 and fp4"),
    ("folder without weights", packed_folder(lambda f: (f / "model.safetensors").unlink()), CheckpointError, "no .safetensors file", "save the model again"),
    ("folder with cut weights", packed_folder(lambda f: (f / "model.safetensors").write_bytes(b"no")), CheckpointError, "model.safetensors: damaged", "copy or save it again"),
    ("folder without config", packed_folder(lambda f: (f / "config.json").unlink()), CheckpointError, "packed", "wanted a hub id"),
    ("folder with a cut config", packed_folder(lambda f: (f / "config.json").write_text("{")), CheckpointError, "packed", "wanted a hub id"),
    ("folder without a tensor", packed_folder(packed_tensors(lambda t: t.pop("model.norm.weight"))), CheckpointError, "model.norm.weight is missing", "do not fit config.json"),
    ("folder with a stray", packed_folder(packed_tensors(lambda t: t.update(stray=torch.ones(2)))), CheckpointError, "stray is unexpected", "do not fit config.json"),
    ("folder of another shape", packed_folder(packed_tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)}))), CheckpointError, "model.norm.weight", "do not fit config.json"),
    ("folder without scales", packed_folder(packed_tensors(lambda t: t.pop(Q0 + ".absmax"))), CheckpointError, Q0 + ".absmax: is missing", "incomplete"),
    ("folder with a strange layer", packed_folder(packed_tensors(lambda t: [t.update({k.replace("q_proj", "x_proj"): t.pop(k)}) for k in list(t) if k.startswith(Q0)])), CheckpointError, "x_proj.weight: the model has no such layer", "wrong config.json?"),
    ("pack into a full folder", lambda w: save_packed(w.packed, w.folder()), CheckpointError, "exists and is not an empty folder", "choose another"),
    ("save what is not packed", lambda w: save_packed(w.llama, w.tmp / "out"), StateError, "no packed layer", "call quantize_model"),
    ("save packed with adapters", lambda w: save_packed(w.adapted, w.tmp / "out"), StateError, "carries adapters", "save_adapter"),
]  # fmt: skip


# ---- training data


def data(text, name="d.jsonl"):
    def call(w):
        (w.tmp / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        read_jsonl(w.tmp / name)

    return call


def turns(*said):
    return data(json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}))


class Bare:
    """A tokenizer without a chat template: a token a letter."""

    eos_token, bos_token, chat_template = "", "", None

    def __call__(self, text, add_special_tokens=True):
        return type("Ids", (), {"input_ids": [ord(letter) % 64 for letter in text]})()


def _made(w, name, text="x"):
    path = w.tmp / "given" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def _taken(w):
    (w.tmp / "out").mkdir()
    (w.tmp / "out" / "log.jsonl").write_text("{}\n")
    claim(w.tmp / "out", False, False)


DATA = [
    ("no file", lambda w: read_jsonl(w.tmp / "x.jsonl"), DataError, "x.jsonl: no such file", "wanted JSONL"),
    ("a folder", lambda w: read_jsonl(w.tmp), DataError, "and no file", "wanted JSONL"),
    ("an empty file", data(""), DataError, "d.jsonl: holds no example", "one JSON object a line"),
    ("blank lines", data("\n \n"), DataError, "d.jsonl: holds no example", "one JSON object a line"),
    ("not JSON", data('{"text": "a"}\n{"text": }'), DataError, "d.jsonl:2:10: not JSON at column 10", "one object a line"),
    ("latin-1", data(b'{"text": "gr\xfc\xdfe"}'), DataError, "d.jsonl:1:13: byte 13 is not UTF-8", "iconv"),
    ("UTF-16", data('{"text": "a"}'.encode("utf-16")), DataError, "d.jsonl:1", "iconv"),
    ("a list", data("[1]"), DataError, "d.jsonl:1: holds a list", "wanted an object"),
    ("another key", data('{"txt": "a"}'), DataError, "has the keys ['txt']", "'messages', 'prompt' and 'completion', or 'text'"),
    ("an empty text", data('{"text": " "}'), DataError, "text is empty", "wanted text"),
    ("a number", data('{"text": 5}'), DataError, "text is a int", "wanted text"),
    ("no completion", data('{"prompt": "a"}'), DataError, "completion is missing", "wanted text"),
    ("no prompt", data('{"completion": "a"}'), DataError, "prompt is missing", "wanted text"),
    ("half a surrogate", data('{"text": "\\ud800"}'), DataError, "half of a surrogate pair", "write the file as UTF-8"),
    ("a deep line", data("[" * 100_000), DataError, "d.jsonl:1", "; "),
    ("a long number", data('{"text": ' + "1" * 5000 + "}"), DataError, "d.jsonl:1: ", "write one plain object a line"),
    ("no turns", data('{"messages": []}'), DataError, "'messages' is not a list with turns", "wanted [{'role'"),
    ("text as messages", data('{"messages": "hi"}'), DataError, "'messages' is not a list with turns", "wanted [{'role'"),
    ("a strange role", turns(("bot", "a")), DataError, "no role of system", "give every turn"),
    ("an empty turn", turns(("user", "a"), ("assistant", "")), DataError, "content of a assistant turn is empty", "wanted text"),
    ("no answer", turns(("user", "a")), DataError, "no assistant turn", "add the answer"),
    ("answer first", turns(("assistant", "a"), ("user", "b")), DataError, "begins with the assistant", "put what was asked before"),
    ("a chat without template", lambda w: encode_all([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], Bare(), 9), DataError, "no chat template", "use an instruct model"),
    ("nothing within the length", lambda w: encode_all([{"prompt": "abcd", "completion": "e"}], Bare(), 3, truncate=True), DataError, "max_length=3", "raise it or shorten"),
    ("a folder of other files", lambda w: read(_made(w, "a.png").parent), DataError, "a folder with no text file in it (a.png)", "wanted files ending in .txt"),
    ("a folder of data", lambda w: read(_made(w, "a.csv").parent), DataError, "a folder with files of data in it", "name them: --data"),
    ("a cut Parquet", lambda w: read(_made(w, "a.parquet", "PAR1")), DataError, "a.parquet: damaged, or no Parquet", "copy or write it again"),
    ("a text called Parquet", lambda w: read(_made(w, "a.parquet")), DataError, "a.parquet: is no Parquet, though", "write it again"),
    ("a PDF", lambda w: read(_made(w, "a.txt", "%PDF-\0")), DataError, "a.txt: is a PDF", "save it as text"),
    ("a CSV of other columns", lambda w: read(_made(w, "a.csv", "a,b\n1,2\n")), DataError, "a.csv:2: has the keys ['a', 'b']", "--columns"),
    ("an object as JSON", lambda w: read(_made(w, "a.json", "{\n}")), DataError, "a.json:1: is one object over several lines", "wanted a list of objects"),
    ("a weight of nothing", lambda w: look_at(f"{_made(w, 'a.txt')}:0"), ConfigError, "a.txt:0: weight 0", "0.5 takes half"),
    ("a run in the folder", _taken, CheckpointError, "holds a run already (log.jsonl)", "--resume"),
    ("a file as folder", lambda w: claim(w.folder() / CONFIG_FILE, False, False), ConfigError, "is a file", "wanted a folder"),
    ("resume and overwrite", lambda w: claim(w.tmp, True, True), ConfigError, "resume and overwrite", "wanted one"),
]  # fmt: skip

ROWS = [
    (f"{about}: {label}", *rest)
    for about, rows in (("load", LOAD), ("write", WRITE), ("packed", BNB), ("data", DATA))
    for label, *rest in rows
]
