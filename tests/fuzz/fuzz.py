"""Feed mutated files to the readers: a typed error of one line, or a valid object; nothing else, and within two seconds.

    python tests/fuzz/fuzz.py --count 10000000        # make fuzz; progress every few seconds, a line of figures at the end

Targets are the header of a weights file, the config, the seal, and whole folders that are loaded into a small model. Inputs are mutated
as bytes, and as the JSON that they are: a value replaced, a key renamed, removed or given twice, offsets shifted together. A run is
determined by its seed. What fails is written to ``--crashes`` with the traceback; put the file into ``corpus/`` once it is mended.
"""

import argparse
import copy
import hashlib
import json
import math
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

from minilora import LoraConfig, MiniLoraError, inject, load_adapter, save_adapter
from minilora.files.parse import parse_header, parse_json
from minilora.lora.config import unknown_keys
from minilora.lora.slots import has_adapters
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE, _check_seal

CORPUS = Path(__file__).with_name("corpus")
LIMIT = 2.0  # seconds of processor time for one input: a busy machine is no hang
LONGEST = 1_300  # signs of a message
MOST_FAILURES = 20  # a run ends after these
SHARES = {"header": 0.6, "config": 0.33, "seal": 0.065, "folder": 0.005}  # of the executions
BYTES = [
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"-",
    b"9" * 30,
    b"null",
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 8, 2**31, 2**48, 2**63, 2**64, 10**400, -(2**63), 0.0, -0.5, 1.5, 1e308, math.nan, math.inf, -math.inf,
    "", "a", "all-linear", "(a+)+$", "[", "../../x", "\n", "\ud800", "é" * 40, "x" * 5_000, "F32", "BF16", "I64", "F8_E4M3", "pt", "LORA",
    "pissa_niter_0", "pissa_niter_" + "9" * 50, [], [[]], [0], [0, 4], [4, 0], [True], ["a", 1], ["first"], {}, {"a": {}},
    {"first": 0}, {"": 1}, {"a{99999999999999999999}": 2}, {"(" * 400: 2},
]  # fmt: skip


# ---- mutations


def mutate_bytes(draw, raw):
    raw = bytearray(raw)
    for _ in range(1 + int(draw.random() ** 3 * 6)):
        kind, at = draw.random(), int(draw.random() * (len(raw) + 1))
        if kind < 0.4 and at < len(raw):
            raw[at] ^= 1 << int(draw.random() * 8)
        elif kind < 0.6:
            raw[at:at] = draw.choice(BYTES)
        elif kind < 0.75:
            del raw[at : at + 1 + int(draw.random() ** 4 * 64)]
        elif kind < 0.9:
            word = draw.choice(BYTES)
            raw[at : at + len(word)] = word
        else:
            end = at + int(draw.random() ** 2 * 80)
            raw[at:at] = raw[at:end]
    return bytes(raw)


def some_place(draw, value):
    """A container in a JSON value, found by a walk from the root."""
    while draw.random() < 0.6:
        inner = [v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, (dict, list))]
        if not inner:
            break
        value = draw.choice(inner)
    return value


def any_value(draw):
    value = draw.choice(VALUES)
    return copy.deepcopy(value) if isinstance(value, (dict, list)) else value


def mutate_json(draw, text, known):
    """The JSON text with some of its values, keys or lengths changed; now and then with a key that comes twice."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(draw, text)
    for _ in range(1 + int(draw.random() ** 3 * 4)):
        if not isinstance(value, (dict, list)):
            break
        place = some_place(draw, value)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        kind = draw.random()
        if kind < 0.5 and keys:
            key = draw.choice(keys)
            old = place[key]
            near = isinstance(old, int) and draw.random() < 0.5
            place[key] = old + draw.choice((-8, -4, -1, 1, 4, 8)) if near else any_value(draw)
        elif kind < 0.65 and keys:
            del place[draw.choice(keys)]
        elif kind < 0.85 and isinstance(place, dict):
            place[draw.choice(known)] = any_value(draw)
        elif keys:
            chosen = draw.choice(keys)
            if isinstance(place, dict):
                place[draw.choice(known)] = place.pop(chosen)
            else:
                place.append(copy.deepcopy(place[chosen]))
    out = json.dumps(value)
    if draw.random() < 0.05 and out[:2] == '{"':
        out = '{"' + draw.choice(known) + '": 1, ' + out[1:]
    return out.encode("utf-8", "surrogatepass")


def mutate_header(draw, raw):
    """A whole weights file: its header as JSON, its length right or wrong, its body as it was or cut."""
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length]
    text = mutate_json(draw, text, HEADER_KEYS) if draw.random() < 0.7 else mutate_bytes(draw, text)
    body = raw[8 + length :]
    if draw.random() < 0.1:
        body = body[: int(draw.random() * len(body))] if draw.random() < 0.5 else body + b"\0" * 4
    size = len(text) if draw.random() < 0.9 else draw.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1))
    return struct.pack("<Q", max(0, size)) + text + body


HEADER_KEYS = [
    "__metadata__",
    "dtype",
    "shape",
    "data_offsets",
    "a",
    "format",
    "minilora_variant",
    "base_model.model.first.lora_A.weight",
]
CONFIG_KEYS = [*LoraConfig().to_dict(), "future_field", "", "__class__"]
SEAL_KEYS = ["version", "files", "base", "sha256", "parameters", "samples", CONFIG_FILE, WEIGHTS_FILE]


# ---- targets: each takes a seed of the corpus and a source of chance, and returns the input and what to do with it


def header(draw, seed):
    raw = mutate_header(draw, seed) if draw.random() < 0.7 else mutate_bytes(draw, seed)

    def check():
        found = parse_header(raw, "file")
        start = 8 + int.from_bytes(raw[:8], "little")
        sizes = [math.prod(entry.shape) * entry.dtype.itemsize for entry in found.entries.values()]
        assert start + sum(sizes) == len(raw) and all(isinstance(v, str) for v in found.metadata.values())
        assert all(start <= entry.begin <= len(raw) for entry in found.entries.values())

    return raw, check


def config(draw, seed):
    raw = mutate_json(draw, seed, CONFIG_KEYS) if draw.random() < 0.7 else mutate_bytes(draw, seed)

    def check():
        try:
            content = parse_json(raw)
        except ValueError:
            return
        dropped = unknown_keys(content)
        found = LoraConfig.from_dict({key: value for key, value in content.items() if key not in dropped}, "file")
        assert found.r >= 1 and math.isfinite(found.lora_alpha) and found.lora_alpha > 0 and 0 <= found.lora_dropout < 1
        assert math.isfinite(found.scaling("a.first"))
        if draw.random() < 0.1:
            json.dumps(found.to_dict())

    return raw, check


def seal(draw, seed):
    raw = mutate_json(draw, seed, SEAL_KEYS) if draw.random() < 0.6 else mutate_bytes(draw, seed)

    def check():
        if raw != seed:
            _check_seal(Path("folder"), {SEAL_FILE: bytearray(raw), CONFIG_FILE: b"{}", WEIGHTS_FILE: b""}, True)
            raise AssertionError("an altered seal passed")

    return raw, check


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(6, 9), "last": nn.Linear(9, 5)})


class Folders:
    """Whole folders: some of their files mutated, the seal gone, kept, or made anew over what was changed."""

    def __init__(self, home):
        self.home, self.model = Path(home), make_model()
        self.state = self.digest()

    def digest(self):
        tensors = b"".join(tensor.numpy().tobytes() for tensor in self.model.state_dict().values())
        flags = [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()]
        return hashlib.sha1(tensors).digest(), flags, has_adapters(self.model), [type(m) for m in self.model.modules()]

    def target(self, draw, seed):
        from minilora.store.adapter_files import seal as sealed

        files = dict(seed)
        for name in draw.sample([CONFIG_FILE, WEIGHTS_FILE], 1 + (draw.random() < 0.2)):
            change = mutate_header if name == WEIGHTS_FILE else lambda d, raw: mutate_json(d, raw, CONFIG_KEYS)
            if draw.random() < 0.3:
                change = mutate_bytes
            files[name] = change(draw, files[name])
        kind = draw.random()
        if kind < 0.5:
            del files[SEAL_FILE]
        elif kind < 0.9:
            files = sealed({name: files[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}, None)
        if draw.random() < 0.03:
            del files[draw.choice(list(files))]

        def check():
            shutil.rmtree(self.home, ignore_errors=True)
            self.home.mkdir()
            for name, content in files.items():
                (self.home / name).write_bytes(content)
            try:
                load_adapter(self.model, self.home)
            except MiniLoraError:
                assert self.digest() == self.state, "a refused folder changed the model"
                raise
            with torch.no_grad():
                self.model["last"](self.model["first"](torch.ones(2, 6)))
            self.model, self.state = make_model(), None
            self.state = self.digest()

        return json.dumps({name: content.hex() for name, content in files.items()}).encode(), check


# ---- the corpus

SEEDS = [{}, {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"last": 2}}, {"modules_to_save": ["last"]}]


def seeds(home):
    """What is mutated, by target: the files in ``corpus/``, and adapters that are saved now."""
    found = {target: [file.read_bytes() for file in sorted(CORPUS.glob(f"{target}-*"))] for target in SHARES}
    found["folder"] = []
    for number, fields in enumerate(SEEDS):
        fields = {
            "r": 3,
            "lora_alpha": 12,
            "target_modules": ["first", "last"][: 1 if "modules_to_save" in fields else 2],
        } | fields
        folder = Path(home) / f"seed-{number}"
        save_adapter(inject(make_model(), LoraConfig(**fields)), folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        found["folder"].append(files)
        found["header"].append(files[WEIGHTS_FILE])
        found["config"].append(files[CONFIG_FILE])
        found["seal"].append(files[SEAL_FILE])
    return found


# ---- the engine


def too_long(*_):
    raise TimeoutError(f"took longer than {LIMIT} s")


def judge(check):
    """What is wrong with the outcome of one input, as a traceback; None if nothing is."""
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        check()
    except MiniLoraError as error:
        message = str(error)
        if "\n" in message or len(message) > LONGEST or not message:
            return f"message of {len(message)} signs, or of several lines: {message[:300]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def fuzz(count, seed=0, targets=tuple(SHARES), crashes=None, say=lambda line: None):
    """Run ``count`` inputs; returns ``({target: executions}, failures)``."""
    draw, done, failures = random.Random(seed), dict.fromkeys(targets, 0), []
    before = signal.signal(signal.SIGPROF, too_long)
    begin = told = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as home,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            corpus, folders = seeds(home), Folders(Path(home) / "folder")
            functions = {"header": header, "config": config, "seal": seal, "folder": folders.target}
            weights = [SHARES[target] for target in targets]
            while sum(done.values()) < count and len(failures) < MOST_FAILURES:
                for target in draw.choices(targets, weights, k=min(500, count - sum(done.values()))):
                    raw, check = functions[target](draw, draw.choice(corpus[target]))
                    done[target] += 1
                    if wrong := judge(check):
                        failures.append((target, wrong))
                        keep(crashes, target, raw, wrong)
                        folders.__init__(Path(home) / "folder")
                        if len(failures) == MOST_FAILURES:
                            break
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    say(
                        f"{sum(done.values()):,} of {count:,}, {sum(done.values()) / (told - begin):,.0f}/s, {len(failures)} failures"
                    )
    finally:
        signal.signal(signal.SIGPROF, before)
    return done, failures


def keep(crashes, target, raw, wrong):
    if crashes is not None:
        crashes.mkdir(parents=True, exist_ok=True)
        name = f"{target}-{hashlib.sha1(raw).hexdigest()[:10]}"
        (crashes / name).write_bytes(raw)
        (crashes / f"{name}.txt").write_text(wrong, errors="replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--crashes", type=Path, default=Path("build/fuzz"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    done, failures = fuzz(
        arguments.count, arguments.seed, arguments.targets, arguments.crashes, lambda line: print(line, flush=True)
    )
    total, spent = sum(done.values()), time.monotonic() - begin
    for target, wrong in failures:
        print(f"{target}: {wrong}")
    each = ", ".join(f"{target} {number:,}" for target, number in done.items())
    print(f"{total:,} executions ({each}), {total / spent:,.0f} per second, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
