"""A saved ``config.json`` in older words beside its own, for programs that know only those.

transformers 5 keeps all of rotary embeddings in ``rope_parameters``. mlx-lm and transformers 4 look for ``rope_theta``, ``rope_scaling``
and ``partial_rotary_factor`` at the top level, and where they find none, most of them take a default of their own without a word: the
logits are then simply wrong. So the older keys are written too, as transformers 4 wrote them. Whether transformers 5 itself still reads
the same configuration is tried, and a key that would change it is left out and told. Next file: ``hf/merge.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.files.parse import parse_json
from minilora.hf.folders import import_transformers

__all__ = ["older_keys", "save_dense", "write_older_keys"]

Config = Mapping[str, Any]
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Where a type had names of its own: base and share of the rotated dimensions; base of the full and of the sliding layers.
_FLAT = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}
_BY_KIND = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
_PATTERNED = ("gemma3_text", "cohere2", "exaone4")  # which layers look at the whole text, they said by a period
# mlx-lm's own code for these computes something else than transformers, whatever the config says; found by comparing logits.
_OTHERWISE = ("dbrx", "ernie4_5_moe", "glm", "jamba", "nemotron_h")
# Of these mlx-lm has a head of its own always, or never, and does not load the other kind; found by loading both.
_HEAD_APART = ("deepseek_v3", "glm4", "gpt_neox", "gptj", "helium", "phi", "qwen2_moe", "stablelm")
_HEAD_TIED = ("cohere", "cohere2", "gemma", "gemma2", "gpt2")


def save_dense(model: Any, folder: Path) -> list[str]:
    """``model.save_pretrained(folder)`` so that other programs read it too; returns what they would get wrong, a sentence each.

    GPT-2 gets the names that its published files have, without ``transformer.``: mlx-lm knows no others, and all programs know these.
    """
    model.save_pretrained(folder, **_gpt2_names(model))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    said = [f"mlx-lm computes {kind} models otherwise than transformers does"] if kind in _OTHERWISE else []
    said += [f"mlx-lm and transformers 4 take a default of their own for {what}" for what in write_older_keys(folder)]
    said = [f"{sentence}; ask the model there before you rely on it" for sentence in said]
    return said + _of_the_head(model, kind)


def _of_the_head(model: Any, kind: str | None) -> list[str]:
    """That mlx-lm does not load the model for its head, which it says by the name of a parameter alone."""
    table, head = (getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("in", "out"))
    if table is None or head is None:
        return []
    tied = head.weight is table.weight
    if kind not in (_HEAD_APART if tied else _HEAD_TIED):
        return []
    wanted = "a head of its own" if tied else "a head that is its embedding"
    return [
        f"mlx-lm does not load it: of {kind} models it takes only those with {wanted}; serve it with another program"
    ]


def _gpt2_names(model: Any) -> dict[str, Any]:
    if getattr(getattr(model, "config", None), "model_type", None) != "gpt2":
        return {}
    head = getattr(model, "lm_head", None)
    tied = head is not None and head.weight is model.transformer.wte.weight
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    if not all(name.startswith("transformer.") for name in state):
        return {}  # a head of its own stands beside the rest, so the names need the prefix
    return {"state_dict": {name.removeprefix("transformer."): value for name, value in state.items()}}


def write_older_keys(folder: Path) -> list[str]:
    """Add the older keys to the ``config.json`` of a folder that transformers has just saved; returns what no older key can say."""
    path = folder / "config.json"
    before, as_it_was = _as_read(folder), path.read_bytes()
    lost: list[str] = []
    new = _with_older_keys(parse_json(as_it_was), lost)
    path.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    if _as_read(folder) != before:
        path.write_bytes(as_it_was)
        lost = ["its rotary embeddings, which transformers itself would read otherwise from the older keys"]
    return lost


def _with_older_keys(config: Config, lost: list[str]) -> dict[str, Any]:
    """``config`` and its sub-configs with the keys that it lacks; what it says already stands."""
    inner = {
        name: _with_older_keys(value, lost)
        for name, value in config.items()
        if isinstance(value, dict) and "model_type" in value
    }
    config = {**config, **inner}
    return {**older_keys(config, lost), **config}


def older_keys(config: Config, lost: list[str]) -> dict[str, Any]:
    """What transformers 4 would have written in place of ``rope_parameters`` and ``layer_types``; ``lost`` gains what it could not."""
    keys = _windows(config, lost) | _renamed(config)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return keys
    kinds: dict[str, Config] = {name: value for name, value in rope.items() if isinstance(value, dict) and value}
    if not kinds:
        return keys | _flat(str(config.get("model_type")), rope)
    return keys | _by_kind(str(config.get("model_type")), kinds, lost)


def _flat(model_type: str, rope: Config) -> dict[str, Any]:
    base, share = _FLAT.get(model_type, ("rope_theta", "partial_rotary_factor"))
    keys = {base: rope["rope_theta"]} if "rope_theta" in rope else {}
    if "partial_rotary_factor" in rope:
        keys[share] = rope["partial_rotary_factor"]
    return keys | {"rope_scaling": _scaling(rope)}


def _scaling(rope: Config) -> dict[str, Any] | None:
    """``rope_scaling``: everything else; None for plain rotary embeddings."""
    if rope.get("rope_type", "default") == "default":
        return None
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}


def _by_kind(model_type: str, kinds: dict[str, Config], lost: list[str]) -> dict[str, Any]:
    """Layers of two kinds: transformers 4 named a base for each, and gave a scaling to the full ones alone.

    Types without such names are younger than ``rope_parameters``: who knows them reads those.
    """
    if len({json.dumps(rope, sort_keys=True) for rope in kinds.values()}) == 1:
        return _flat(model_type, next(iter(kinds.values())))
    if model_type not in _BY_KIND:
        return {}
    plain = _scaling(kinds.get(_SLIDING, {})) is None and not any("partial_rotary_factor" in r for r in kinds.values())
    if kinds.keys() != {_FULL, _SLIDING} or not plain:
        lost.append(f"rope_parameters of {' and '.join(kinds)}")
        return {}
    bases = {
        name: kinds[kind]["rope_theta"] for name, kind in zip(_BY_KIND[model_type], (_FULL, _SLIDING), strict=True)
    }
    return bases | {"rope_scaling": _scaling(kinds[_FULL])}


def _windows(config: Config, lost: list[str]) -> dict[str, Any]:
    """``sliding_window_pattern``: every how many layers one looks at the whole text."""
    types = config.get("layer_types")
    if config.get("model_type") not in _PATTERNED or not isinstance(types, list) or _SLIDING not in types:
        return {}
    period = types.index(_FULL) + 1 if _FULL in types else len(types) + 1
    if types != [_FULL if (place + 1) % period == 0 else _SLIDING for place in range(len(types))]:
        lost.append("layer_types, which follow no sliding_window_pattern")
        return {}
    return {"sliding_window_pattern": period}


def _renamed(config: Config) -> dict[str, Any]:
    """Fields that had another name: transformers still takes it, and says which one it stands for."""
    kinds, kind = import_transformers().CONFIG_MAPPING, config.get("model_type")
    names = {**(getattr(kinds[kind], "attribute_map", {}) if kind in kinds else {}), "n_ctx": "n_positions"}
    return {old: config[names[old]] for old in _RENAMED if names.get(old) in config}


def _as_read(folder: Path) -> Any:
    """What transformers makes of the folder's configuration; None for a type that is not its own."""
    kinds = import_transformers().CONFIG_MAPPING
    kind = parse_json((folder / "config.json").read_bytes()).get("model_type")
    if kind not in kinds:
        return None
    read = kinds[kind].from_pretrained(str(folder), local_files_only=True)
    return _without(json.loads(read.to_json_string(use_diff=False)))


def _without(content: Any) -> Any:
    """Without the older keys themselves, which transformers keeps beside ``rope_parameters`` as they are."""
    if isinstance(content, dict):
        kept = {name: value for name, value in content.items() if name not in _OLDER}
        return {name: value if name == "rope_parameters" else _without(value) for name, value in kept.items()}
    return content


_RENAMED = ("num_experts", "n_ctx")
_OLDER = {"rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window_pattern", *_RENAMED}
_OLDER |= {name for names in (*_FLAT.values(), *_BY_KIND.values()) for name in names}
