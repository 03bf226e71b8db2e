"""What ``minilora verify`` says of a real llama.cpp server in every case that it tells apart: a small random Llama, its adapter.

    python benchmarks/verify.py        # a minute; needs xllamacpp and gguf; then docs/tables.py

A row has the distances of the server's answers from the base, from the adapted model and from the best scale, in nats (root mean square
difference of log-probabilities, weighted by probability), and the verdict.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import RESULTS, stamp, write_csv  # type: ignore[import-not-found,unused-ignore]

from minilora.proof import read_probe, seal_folder, verify
from minilora.proof.verdict import effect
from tests.llama_cpp import serving
from tests.models import byte_tokenizer
from tests.proof.conftest import adapted
from tests.proof.servings import SERVINGS, written


def measured(place: Path) -> list[dict[str, Any]]:
    """A row for each case."""
    model = adapted()
    model.save_pretrained(place / "adapter")
    seal_folder(model, byte_tokenizer(), place / "adapter", ["hello there"], name="tiny")
    moved, rows = effect(read_probe(place / "adapter")), []
    for what, case in SERVINGS.items():
        base, lora = (written(name, place / "adapter", place) for name in (case.base, case.adapter))
        with serving(base, lora, case.scale, context=256) as url:
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
