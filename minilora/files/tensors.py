"""The tensors of a folder's safetensors files, one at a time: the files stay open, and memory holds what was asked for.

The headers are checked first, as for a file that is read whole (``files/parse.py``), so names, shapes and sizes are known before a tensor
is read. Next file: ``files/write.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minilora.errors import CheckpointError
from minilora.files import disk
from minilora.files.parse import LONGEST_JSON, Entry, parse_header, tensor_at

__all__ = ["Tensors", "open_tensors", "tensors_of_files"]


@dataclass(frozen=True)
class _Place:
    path: Path
    file: disk.Opened
    entry: Entry


class Tensors:
    """Tensors by name, each read anew whenever it is asked for.

    Attributes:
        shapes: name to shape, in the order of the files. metadata: what the files say of themselves, text to text.
    """

    def __init__(self, places: dict[str, _Place], metadata: Mapping[str, str]) -> None:
        self._places, self.metadata = places, metadata
        self.shapes = {name: place.entry.shape for name, place in places.items()}

    def dtype(self, name: str) -> str:
        """The number format of a tensor, as ``float32``."""
        return str(self._places[name].entry.dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own. Raises ``CheckpointError`` if its file became shorter meanwhile, or cannot be read."""
        place = self._places[name]
        entry = place.entry
        try:
            raw = place.file.read(entry.begin, entry.nbytes)
        except OSError as error:
            raise _unread(place.path, error) from None
        if len(raw) < entry.nbytes:
            raise CheckpointError(
                f"{place.path}: ends within {name[:200]}; it was cut off while it was read, copy it again"
            )
        return tensor_at(raw, Entry(entry.dtype, entry.shape, 0))


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """All tensors of the ``.safetensors`` files of a folder.

    Raises:
        CheckpointError: there is no such file, one is damaged or cannot be read, or a tensor is in two of them.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no .safetensors file; pickles are not read, save the model again")
    with tensors_of_files(paths) as tensors:
        yield tensors


@contextmanager
def tensors_of_files(paths: Iterable[Path]) -> Iterator[Tensors]:
    """All tensors of these files. Raises as ``open_tensors``."""
    places: dict[str, _Place] = {}
    metadata: dict[str, str] = {}
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(closing(disk.used.open(path)))
                head = file.read(0, min(8 + LONGEST_JSON, file.size))
            except OSError as error:
                raise _unread(path, error) from None
            header = parse_header(head, path, file.size)
            entries = header.entries
            if twice := entries.keys() & places.keys():
                raise CheckpointError(
                    f"{path}: {min(twice)[:200]} is in another file of the folder, too; keep one of them"
                )
            places |= {name: _Place(path, file, entry) for name, entry in entries.items()}
            metadata |= header.metadata
        yield Tensors(places, metadata)


def _unread(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: the model's weights cannot be read ({error.strerror}); check the path")
