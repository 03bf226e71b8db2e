"""What ``minilora verify`` says of a real llama.cpp server in every case that it tells apart: a small random Llama, its adapter.

    python benchmarks/verify.py        # a minute; needs xllamacpp and gguf; then docs/tables.py

A row has the distances of the server's answers from the base, from the adapted model and from the best scale, in nats (root mean square
difference of log-probabilities, weighted by probability), and the verdict.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import RESULTS, stamp, write_csv  # type: ignore[import-not-found,unused-ignore]

from minilora.export.stored import stored_factors
from minilora.proof import read_probe, seal_folder, verify
from minilora.proof.verdict import effect
from minilora.store.adapter_files import read_adapter
from tests.gguf_llama import write_lora, write_model
from tests.llama_cpp import serving
from tests.models import CHATML, byte_tokenizer
from tests.proof.conftest import adapted, base

# What is served: the base's GGUF, the adapter's ("" for none), its scale.
CASES: Mapping[str, tuple[str, str, float]] = {
    "the adapter on its base": ("F32", "own", 1.0),
    "on its base in half precision": ("F16", "own", 1.0),
    "no adapter": ("F32", "", 1.0),
    "scale halved": ("F32", "own", 0.5),
    "scale 0.8": ("F32", "own", 0.8),
    "scale 1.3": ("F32", "own", 1.3),
    "down_proj left out": ("F32", "no down_proj", 1.0),
    "rsLoRA read as lora_alpha / r": ("F32", "over r", 1.0),
    "another adapter": ("F32", "other", 1.0),
    "another base": ("other base", "own", 1.0),
    "another base, no adapter": ("other base", "", 1.0),
    "another chat template": ("other template", "own", 1.0),
    "base in Q8_0": ("Q8_0", "own", 1.0),
    "base in Q4_0": ("Q4_0", "own", 1.0),
    "base in Q4_0, no adapter": ("Q4_0", "", 1.0),
    "base in Q4_0, scale halved": ("Q4_0", "own", 0.5),
}


def written(place: Path, name: str) -> Path | None:
    """The GGUF file of this name, written if it is not there."""
    path = place / f"{name}.gguf"
    if path.exists() or not name:
        return path if name else None
    tokenizer, config = byte_tokenizer(), base().config
    own = stored_factors(read_adapter(place / "adapter"), "llama.cpp")
    if name == "other":
        adapted(5).save_pretrained(place / "other")
        write_lora(stored_factors(read_adapter(place / "other"), "llama.cpp"), config, path)
    elif name in ("own", "no down_proj", "over r"):
        factor = {"own": 1.0, "no down_proj": 1.0, "over r": 3**-0.5}[name]
        left_out = "down_proj" if name == "no down_proj" else "nothing"
        write_lora(own, config, path, lambda layer: 0.0 if left_out in layer else factor)
    elif name == "other base":
        write_model(base(7), tokenizer, path)
    elif name == "other template":
        write_model(base(), tokenizer, path, template=CHATML.replace("assistant\n", "assistant\n\n"))
    else:
        write_model(base(), tokenizer, path, name)
    return path


def measured(place: Path) -> list[dict[str, Any]]:
    """A row for each case."""
    model = adapted()
    model.save_pretrained(place / "adapter")
    seal_folder(model, byte_tokenizer(), place / "adapter", ["hello there"], name="tiny")
    moved, rows = effect(read_probe(place / "adapter")), []
    for what, (served, adapter, scale) in CASES.items():
        with serving(written(place, served), written(place, adapter), scale, context=256) as url:
            found = verify(place / "adapter", url)
        names = ("from the base", "from the adapted model", "from the best scale")
        off = {name: f"{value:.4f}" for name, value in zip(names, found.distances, strict=True)}
        row = {"what": what, "effect": f"{moved:.3f}", **off, "scale": f"{found.scale:.2f}"}
        rows.append(row | {"verdict": found.kind, "exit code": str(found.code)})
        print(f"{what:32} {found.kind:24} {found.text[:100]}", flush=True)
    return rows


def main() -> None:
    """Measure, and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "verify.csv")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as place:
        rows = measured(Path(place))
    write_csv(out, rows, stamp("xllamacpp", "gguf", "transformers"))


if __name__ == "__main__":
    main()
