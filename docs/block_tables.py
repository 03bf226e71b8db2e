"""Write the tables that the block explorer computes with: ``docs/static/explorer/tables.js``, from ``minilora.quant.codebooks``.

    python docs/block_tables.py

The levels are typed once, in minilora. ``tests/browser/test_block_explorer.py`` holds the file equal to what this writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from minilora.quant.codebooks import CODEBOOKS, Codebook, dynamic_map  # noqa: E402

TARGET = DOCS / "static" / "explorer" / "tables.js"
FORMATS = ("nf4", "fp4", "int4", "nf3", "nf2", "sf4", "e2m1", "af4", "bof4s")  # those of at most 4 bits
HEAD = """\
// Written by docs/block_tables.py from minilora.quant.codebooks: change the levels there, and run it again.
// A format has levels by code, the midpoints between its sorted levels, and the code of each cell between two midpoints.
"use strict";
"""


def table(book: Codebook) -> str:
    """One format as JSON. Every float32 number is written so that it is read back to the bit."""
    midpoints, codes = book.thresholds()
    levels = {"levels": book.table().tolist(), "midpoints": midpoints.tolist(), "codes": codes.tolist()}
    return json.dumps({"bits": book.bits, "signed": book.signed, "source": book.source, **levels})


def script() -> str:
    """The text of the file."""
    formats = "".join(f'    "{name}": {table(CODEBOOKS[name])},\n' for name in FORMATS)
    scales = json.dumps(dynamic_map().tolist())
    return f'{HEAD}const TABLES = {{\n  "formats": {{\n{formats}  }},\n  "scales": {scales},\n}};\n'


if __name__ == "__main__":
    TARGET.write_text(script(), encoding="utf-8")
