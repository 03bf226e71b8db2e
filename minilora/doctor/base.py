"""Checks against the base model's config: paths that it does not have, shapes that do not fit, tables of another size.

Next file: ``doctor/around.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from minilora.doctor.case import Case
from minilora.doctor.finding import FAULT, NOTE, WARNING, Finding, named
from minilora.doctor.keys import EMBEDDINGS
from minilora.doctor.model import Module
from minilora.errors import nearest
from minilora.lora.targets import endings
from minilora.store.adapter_files import PREFIX, PROJECTIONS
from minilora.store.contents import part_of
from minilora.store.tables import table_of

__all__ = ["CHECKS"]

_WAY = "give the base that it was trained on by --model; models were renamed inside by newer releases of transformers"


def paths(case: Case) -> Iterator[Finding]:
    """Layers that the base does not have."""
    if case.base is None or case.content.get("layer_replication"):  # PEFT copies layers of the base then
        return
    lost = sorted(layer.path for layer in case.layers if not _known(case, layer.path))
    if case.headless:
        ends = {end for path in case.base.modules for end in endings(path)}
        lost = [path for path in lost if ends.isdisjoint((path, path.partition(".")[2]))]
    if lost:
        near = nearest(lost[0], case.base.modules, 1)
        said = f"{len(lost)} of {len(case.layers)} layers are not in {case.base.name} ({named(lost)}; the nearest there is {near})"
        yield Finding(FAULT, "paths", f"{said}: servers skip them in silence", _WAY)


def _known(case: Case, path: str) -> bool:
    """Whether the base has such a layer, or a weight of that name (of experts, routers)."""
    assert case.base is not None
    owner, _, name = path.rpartition(".")
    held = case.base.modules.get(owner)
    return path in case.base.modules or (held is not None and name in held.shapes)


def shapes(case: Case) -> Iterator[Finding]:
    """Factors that do not fit the base's layers."""
    if case.base is None:
        return
    odd = []
    for layer in case.layers:
        module, own = case.base.modules.get(layer.path), case.parts.get(layer.path, {})
        if module is not None and (said := _unlike(module, {name: case.seen[key].shape for name, key in own.items()})):
            odd.append(f"{layer.path} {said}")
    if odd:
        said = f"{len(odd)} of {len(case.layers)} layers do not fit {case.base.name} ({odd[0]})"
        yield Finding(FAULT, "shapes of the base", said, _WAY)


def _unlike(module: Module, held: dict[str, tuple[int, ...]]) -> str:
    """In what the factors differ from the layer's sides; "" for nothing, and for kinds of layers whose factors have other shapes."""
    A, B = held.get("lora_A.weight"), held.get("lora_B.weight")
    if module.kind != "linear" or A is None or B is None:
        return ""
    found = (A[1], B[0])
    return (
        ""
        if found == module.sides
        else f"is {found[1]} x {found[0]} in the file, {module.sides[1]} x {module.sides[0]} there"
    )


def tables(case: Case) -> Iterator[Finding]:
    """Embedding tables in the file, which are resized ones as a rule."""
    rows = {
        table_of(key): seen.shape[0]
        for key, seen in case.seen.items()
        if part_of(key) is None and len(seen.shape) == 2 and table_of(key).rpartition(".")[2] in EMBEDDINGS
    }
    if not rows:
        return
    own = case.base.vocabulary if case.base is not None else 0
    if own and (grown := [f"{path} with {count:,} rows" for path, count in rows.items() if count != own]):
        said = f"{named(grown)}: the vocabulary was resized from {own:,}, and a server that loads the base alone has no such rows"
        yield Finding(WARNING, "resized", said, "merge it (minilora merge), or resize the base before it is served")
    elif not any(set(path.split(".")) & set(case.names("modules_to_save")) for path in rows):
        said = f"{named(list(rows))}: the base's own table lies in the file, as PEFT saves it beside an adapter of an embedding"
        yield Finding(
            NOTE, "tables", said, "nothing to do; without it the file would be smaller (save_embedding_layers=False)"
        )


def foreign_copies(case: Case) -> Iterator[Finding]:
    """Tensors of modules that the base does not have, or that are of another shape there."""
    if case.base is None or case.headless:
        return
    for key, seen in case.seen.items():
        owner, _, name = key.removeprefix(PREFIX).rpartition(".")
        held = case.base.modules.get(owner)
        if (
            part_of(key) is not None
            or ".token_adapter" in key
            or ".base_layer" in key
            or key in PROJECTIONS
            or owner.rpartition(".")[2] in EMBEDDINGS
        ):
            continue
        if held is None or held.shapes.get(name, seen.shape) != seen.shape:
            what = "is not in" if held is None else f"is {list(seen.shape)}, and {list(held.shapes[name])} in"
            yield Finding(
                WARNING, "copies of the base", f"{owner}.{name} {what} {case.base.name} as a language model", _WAY
            )
            return


CHECKS = (paths, shapes, tables, foreign_copies)
