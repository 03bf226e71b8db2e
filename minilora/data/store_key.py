"""What the tokens of a store depend on: change any of it, and another store is made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import tempfile
from pathlib import Path
from typing import Any

from minilora.data.sources.part import Source
from minilora.errors import DataError

__all__ = ["key_of"]

_PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken")


def key_of(source: Source, tokenizer: Any, way: dict[str, Any]) -> dict[str, Any]:
    """The key as JSON: the source's hash and formats, the tokenizer, how it is encoded, the versions, and the code of this folder.

    Raises:
        DataError: the tokenizer cannot be saved, so that nothing says whether it is the same.
    """
    here = Path(__file__).parent
    own = {str(file.relative_to(here)): file.read_bytes() for file in here.rglob("*.py")}
    return {
        "file": source.sha256,
        "kinds": source.kinds,
        "tokenizer": _tokenizer(tokenizer),
        "way": way,
        "versions": {name: _version(name) for name in _PACKAGES},
        "code": _hash(own),
    }


def _tokenizer(tokenizer: Any) -> str:
    """Of the files that it saves, its chat template among them, and of code that came with it."""
    with tempfile.TemporaryDirectory() as place:
        try:
            tokenizer.save_pretrained(place)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the tokenizer cannot be saved ({reason}), so its tokens cannot be kept; use another one"
            ) from None
        files = {str(file.relative_to(place)): file.read_bytes() for file in Path(place).rglob("*") if file.is_file()}
    for cls in type(tokenizer).__mro__[:-1]:
        source = inspect.getsourcefile(cls)
        if source:
            files[f"{cls.__module__}.{cls.__qualname__}"] = Path(source).read_bytes()
    return _hash(files)


def _hash(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
