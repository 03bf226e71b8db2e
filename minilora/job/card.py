"""The model card of a run: base, data and their hashes, settings, losses, answers before and after, and how to load the adapter.

All of it comes from the run folder: the adapter, ``job.json`` and ``log.jsonl``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, for_terminal
from minilora.export.servers import servers_of
from minilora.job.given import setting_names
from minilora.job.record import Record, read_record
from minilora.peft.card import card_of
from minilora.report.canvas import missing
from minilora.report.figures import loss_figure
from minilora.report.tables import Row, as_markdown
from minilora.store.adapter_files import Stored, read_adapter
from minilora.training.left import kept_records

__all__ = ["FIGURE", "card_files"]

FIGURE = "loss.png"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Settings that say where files lie on one machine, or what to do with an earlier run.
_PRIVATE = {
    "model",
    "data",
    "eval_data",
    "init_from",
    "out",
    "resume",
    "overwrite",
    "push_to_hub",
    "private",
    "prompts",
    "system",
    "base_model_name_or_path",
    "inference_mode",
    "fan_in_fan_out",
    "trust_remote_code",
}


def card_files(folder: Path, repo_id: str) -> dict[str, bytes]:
    """``README.md`` and, where matplotlib is installed, the curve of the losses as ``loss.png``.

    Raises:
        CheckpointError: the folder holds no whole adapter, or a damaged record; or its run goes on, or broke off.
    """
    stored, record, records = read_adapter(folder), read_record(folder), kept_records(folder)
    _refuse_unfinished(folder, record)
    drawn = _figure(records)
    parts = [
        _title(stored, record, repo_id),
        _results(records, drawn is not None),
        _answers(record),
        _loading(stored, record, repo_id),
        _settings(stored, record),
        _versions(record),
    ]
    text = card_of("\n\n".join(filter(None, parts)) + "\n", _base(stored), stored.config.task_type)
    return {"README.md": text.encode()} | ({FIGURE: drawn} if drawn else {})


def _refuse_unfinished(folder: Path, record: Record | None) -> None:
    """The adapter of a run that goes on is that of its last end, and the log is further: no card tells both."""
    if record and record.sessions and record.sessions[-1].stop != record.settings.get("steps"):
        ended = any("after" in answer for answer in record.answers) or not record.answers
        if record.sessions[-1].stop is None or not ended:
            raise CheckpointError(
                f"{folder}: its run has not ended, and the adapter is not that of its last step; go on with it by --resume, then push it"
            )


def _base(stored: Stored) -> str | None:
    """The base's id on the Hub; a folder of this machine is none."""
    name = stored.config.base_model_name_or_path or ""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _title(stored: Stored, record: Record | None, repo_id: str) -> str:
    base = _base(stored)
    of = f"[{base}](https://huggingface.co/{base})" if base else "a local model"
    lines = [f"# {repo_id.rpartition('/')[2]}", "", f"A LoRA adapter for {of}, trained with minilora."]
    for file in record.data if record else ():
        lines += ["", f"Data: `{_plain(Path(file.path).name)}`, SHA-256 `{file.sha256}`"]
    if record:
        lines += ["", f"The linear layers of the base were {record.packing} while it was trained."]
    if record and record.system:
        lines += ["", "System turn before every prompt:", "", _quoted(record.system)]
    return "\n".join(lines)


def _results(records: Sequence[Mapping[str, Any]], drawn: bool) -> str:
    rows = []
    for name, key in (("training loss", "loss"), ("held-out loss", "eval_loss")):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            rows.append(Row(name, [f"{values[0]:.3f}", f"{values[-1]:.3f}"]))
    if not rows:
        return ""
    steps = max(record["step"] for record in records)
    parts = ["## Losses", f"In nats per token, over {steps} steps.", as_markdown(["before", "after"], rows)]
    return "\n\n".join([*parts, *([f"![Loss by optimizer step]({FIGURE})"] if drawn else [])])


def _figure(records: Sequence[Mapping[str, Any]]) -> bytes | None:
    if missing() or not any(record.get(key) is not None for record in records for key in ("loss", "eval_loss")):
        return None
    content = io.BytesIO()
    loss_figure(records).savefig(content, format="png", dpi=144, metadata={"Software": None})
    return content.getvalue()


def _answers(record: Record | None) -> str:
    parts = []
    for answer in record.answers if record else ():
        if "after" in answer:
            parts += [f"Prompt:\n\n{_quoted(answer['prompt'])}", f"Before training:\n\n{_quoted(answer['before'])}"]
            parts += [f"After training:\n\n{_quoted(answer['after'])}"]
    return "\n\n".join(["## Before and after", *parts]) if parts else ""


def _loading(stored: Stored, record: Record | None, repo_id: str) -> str:
    """Commands that load the adapter in minilora, PEFT and vLLM."""
    base = _base(stored) or "BASE"
    packed = record.packing if record and record.packing.quant != "none" else None
    flags = f" --quant {packed.quant}{'' if packed.double_quant else ' --no-double-quant'}" if packed else ""
    if packed and packed.by_folder:  # its own folder brings the packing
        base, flags = (base if record and record.model == base else "FOLDER_OF_THE_PACKED_BASE"), ""
    (vllm,) = [server for server in servers_of(stored, Path(repo_id)) if server.name == "vLLM"]
    how = vllm.why.replace(stored.config.base_model_name_or_path or "BASE", base)
    serve = f"```sh\n{how}\n```" if vllm.takes == "as it is" else f"Not as it is: {_plain(how)}."
    return f"""## Load it

minilora:

```sh
minilora chat --model {base}{flags} --adapter {repo_id}
```

PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo_id}")
```

vLLM:

{serve}"""


def _settings(stored: Stored, record: Record | None) -> str:
    own = {"r": stored.config.r, "lora_alpha": stored.config.lora_alpha, "variant": stored.variant}
    known = dict(record.settings) if record else {}
    names = setting_names() - _PRIVATE
    told = {name: value for name, value in known.items() if name in names and value not in (None, "", [], {})}
    every = own | {name: value for name, value in told.items() if not _is_path(value)}
    rows = [Row(name, [_plain(str(value))]) for name, value in every.items()]
    return "## Settings\n\n" + as_markdown(["value"], rows)


def _is_path(value: Any) -> bool:
    """Whether a setting names something on this disk, of which a card says nothing."""
    if isinstance(value, list):
        return any(map(_is_path, value))
    return isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists())


def _versions(record: Record | None) -> str:
    lines = [f"- {name} {_plain(version)}" for name, version in (record.versions if record else {}).items()]
    return "\n".join(["### Framework versions", "", *lines]) if lines else ""


def _quoted(text: str) -> str:
    """Text of a model or a user as a block that means nothing to markdown."""
    text = for_terminal(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _plain(text: str) -> str:
    """One line without signs that markdown goes by."""
    return re.sub(r"[`<>\[\]|\n]", " ", text)
