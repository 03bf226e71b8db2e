"""``minilora info``: what an adapter folder, a run, a packed model or a GGUF file is, and what is in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from minilora.cli.flags import Flag, add_flags
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say

USAGE = "FOLDER [--json]"
EXAMPLES = """\
  minilora info runs/mine
  minilora info smollm2.gguf
  minilora info runs/packed --json"""

_WIDTH = 16  # of the names of facts


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora info`` takes."""
    add_plugin_flag(parser)
    what = (
        'an adapter (ours or PEFT\'s), a run, a checkpoint of one, a model, packed or not, or a GGUF file; "smollm2", '
        '"smollm2.gguf" and models in the Hub\'s cache by their names (required)'
    )
    parser.add_argument("folder", help=what)
    add_flags(parser, "output", [Flag("json", bool, False, "print all of it as JSON, for a program to read")])


def run(arguments: argparse.Namespace) -> None:
    """Look, and print."""
    from minilora.job.info import look

    found = look(arguments.folder)
    say(json.dumps(found, indent=1, ensure_ascii=False) if arguments.json else shown(found))


def shown(found: Mapping[str, Any]) -> str:
    """Everything that is known of a folder as text: facts, then the table of updates, then who takes it."""
    parts = [f"{found['folder']}: {found['kind']}", *(f"  {name.ljust(_WIDTH)}{text}" for name, text in _facts(found))]
    if found.get("updates"):
        parts += ["", _updates(found["updates"])]
    if found.get("servers"):
        parts += ["", _servers(found["servers"])]
    return "\n".join(parts)


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    every = (*_of_adapter(found), *_of_model(found), *_of_run(found), *_of_files(found))
    return [(name, text) for name, text in every if text]


def _of_adapter(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "variant" not in found:
        return []
    rslora = ", rank-stabilized" if found["rslora"] else ""
    others = ", ".join(f"{module or 'the model'} ({count:,} numbers)" for module, count in found["others"].items())
    untrained = (
        f"{found['untrained']} of {found['layers']['covered']} layers: B is all zeros" if found["untrained"] else ""
    )
    return [
        ("base", found["base"] or "not said"),
        ("variant", found["variant"] + rslora),
        ("layers", _layers(found["layers"])),
        ("rank", _each(found["ranks"])),
        ("scaling", f"{_each(found['scalings'])}; lora_alpha {found['lora_alpha']:g}"),
        ("untrained", untrained),
        ("also trained", others),
    ]


def _layers(layers: Mapping[str, Any]) -> str:
    if layers["of"] is None:
        return f"{layers['covered']} (of how many is not known: the base is not on this disk)"
    rest = (
        f"; not {', '.join(layers['without'][:4])}{' ...' * (len(layers['without']) > 4)}" if layers["without"] else ""
    )
    return f"{layers['covered']} of {layers['of']} linear weights, experts included{rest}"


def _each(counts: Mapping[str, int]) -> str:
    """A value that all layers have, or each with how many have it."""
    return (
        next(iter(counts)) if len(counts) == 1 else ", ".join(f"{value} ({count})" for value, count in counts.items())
    )


def _of_model(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "architecture" not in found:
        return []
    packed = found.get("packed_layers")
    nested = ", double quantization" if found.get("double_quant") else ""
    return [
        ("name", found.get("name") or ""),
        ("architecture", found["architecture"] or "not said"),
        ("packed", f"{packed} weights in {found['format']}{nested}" if packed else "no"),
        ("not packed", f"{found['dense_parameters']:,} parameters" if packed else ""),
        ("text is cut by", found.get("pre_tokenizer") or ""),
    ]


def _of_run(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not (run := found.get("run")):
        return []
    loss, held = (f"{run[key][0]:.3f} -> {run[key][1]:.3f}" if run[key] else "" for key in ("loss", "held_out_loss"))
    steps = ", ".join(map(str, found.get("checkpoints", ())))
    spent = f" in {run['seconds']:.0f} s" if run["seconds"] is not None else ""
    return [
        ("trained on", ", ".join(run[key] for key in ("model", "packing") if run.get(key))),
        ("system turn", run.get("system", "")),
        ("steps", f"{run['steps']}{spent}"),
        ("training loss", loss),
        ("held out", held and f"loss {held}"),
        ("checkpoints", steps),
    ]


def _of_files(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    from minilora.report.tables import human_bytes

    numbers = f"{found['parameters']:,} parameters, " if "parameters" in found else ""
    kinds = f" in {_each(found['dtypes'])}" if found.get("dtypes") else ""
    size = f"{numbers}{human_bytes(found['size'])}{kinds}" if "size" in found else ""
    return [("size", size), ("seal", found.get("seal", "")), ("sha256", found.get("sha256", ""))]


def _updates(updates: list[Mapping[str, Any]]) -> str:
    from minilora.report.tables import Row, as_text, short_number

    rows = []
    for update in updates:
        unknown = update["norm"] is None
        texts = [str(update["layers"]), *("-" if unknown else short_number(update[key]) for key in ("norm", "largest"))]
        texts += ["-" if unknown else update["largest_in"], str(update["untrained"] or "")]
        rows.append(Row(update["kind"], texts))
    columns = ["layers", "norm of update", "largest", "in", "untrained"]
    if not any(update["untrained"] for update in updates):
        columns, rows = columns[:-1], [Row(row.name, row.texts[:-1]) for row in rows]
    note = "" if all(update["norm"] is not None for update in updates) else "\n-: the weights of the base decide it"
    return as_text(columns, rows, bars=False) + note


def _servers(servers: list[Mapping[str, str]]) -> str:
    names, takes = (max(len(server[key]) for server in servers) for key in ("name", "takes"))
    return "who takes it:\n" + "\n".join(
        f"  {server['name'].ljust(names)}  {server['takes'].ljust(takes)}  {server['why']}" for server in servers
    )
