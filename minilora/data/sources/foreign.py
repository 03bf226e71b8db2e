"""Files that hold no examples, known by their first bytes: what each is, and the way out. Next file: ``data/sources/kinds.py``."""

from __future__ import annotations

__all__ = ["FIRST", "foreign"]

FIRST = 512  # bytes that are looked at
# First bytes, what such a file is, and what to do with it.
_KNOWN: list[tuple[bytes, str, str]] = [
    (b"\x1f\x8b", "compressed (gzip)", "unpack it first (gunzip)"),
    (b"BZh", "compressed (bzip2)", "unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed (xz)", "unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstandard)", "unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z)", "unpack it first"),
    (b"Rar!", "an archive (rar)", "unpack it first"),
    (b"PK\x03\x04", "a zip archive (an .xlsx workbook is one too)", "unpack it first, or save the workbook as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "a document of Microsoft Office", "save it as CSV UTF-8, or as text"),
    (b"%PDF", "a PDF", "save it as text (pdftotext)"),
    (b"{\\rtf", "a document (RTF)", "save it as text"),
    (b"SQLite format 3\x00", "a database of SQLite", "export its table as CSV"),
    (b"\x89HDF\r\n", "an HDF5 file", "write its rows as JSONL or Parquet"),
    (b"\x93NUMPY", "an array of numpy", "give the texts, as JSONL or Parquet"),
    (b"Obj\x01", "an Avro file", "write its rows as JSONL or Parquet"),
    (b"ORC", "an ORC file", "write its rows as JSONL or Parquet"),
    (b"FEA1", "a Feather file of the first version", "write it again with a newer pyarrow, or as Parquet"),
    (b"GGUF", "a model (GGUF)", "name it with --model, and the data with --data"),
    (b"\x80\x02", "a pickle", "write its rows as JSONL or Parquet; pickles are not read"),
    (b"\x80\x03", "a pickle", "write its rows as JSONL or Parquet; pickles are not read"),
    (b"\x80\x04", "a pickle", "write its rows as JSONL or Parquet; pickles are not read"),
    (b"\x80\x05", "a pickle", "write its rows as JSONL or Parquet; pickles are not read"),
    (b"\x89PNG", "a picture", "give texts"),
    (b"\xff\xd8\xff", "a picture", "give texts"),
    (b"\x7fELF", "a program", "give texts"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it (git lfs pull)"),
    (b"<!DOCTYPE html", "a web page", "download the file itself (on the Hub: resolve/main, not blob/main)"),
    (b"<!doctype html", "a web page", "download the file itself (on the Hub: resolve/main, not blob/main)"),
    (b"<html", "a web page", "download the file itself (on the Hub: resolve/main, not blob/main)"),
]  # fmt: skip


def foreign(first: bytes) -> tuple[str, str] | None:
    """What a file with these first bytes is, and the way out; None if it may hold examples."""
    if first[8:9] == b"{" and b'"dtype"' in first and int.from_bytes(first[:8], "little") < 100_000_000:
        return "a file of tensors (safetensors)", "name the model with --model, and the data with --data"
    return next(((what, way) for begins, what, way in _KNOWN if first.startswith(begins)), None)
