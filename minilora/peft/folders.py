"""A model's adapters in folders: loading into it, saving, the card, the Hub. Next file: ``peft/peft_model.py``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minilora.errors import StateError, nearest
from minilora.files.hub import cached
from minilora.files.write import write_files
from minilora.lora.inject import place
from minilora.lora.slots import adapters_of
from minilora.peft.card import write_card
from minilora.peft.face import in_base_dtype
from minilora.peft.hub import folder_of, name_of, push
from minilora.peft.many import Many, as_names
from minilora.peft.notes import say_changed_base, say_left_out
from minilora.peft.plain import plain_files
from minilora.peft.utils.save_and_load import taken_from
from minilora.store import load as checkpoint
from minilora.store.save import adapter_files

__all__ = ["Folders"]


# What transformers' method of this name takes beside PEFT's, and means nothing for an adapter's two files.
_IDLE = (
    "max_shard_size", "token", "use_auth_token", "save_peft_format", "save_original_format", "private", "create_pr", "commit_message",
    "commit_description", "repo_id", "revision", "organization", "tags",
)  # fmt: skip


def refuse_unmeant(others: Mapping[str, Any], save_function: Any) -> None:
    """Raise ``StateError`` for an argument of ``save_pretrained`` that asks for something else than an adapter's files."""
    if save_function is not None and not callable(save_function):
        raise StateError(f"save_function={save_function!r}: wanted a function, such as accelerator.save")
    if others.get("push_to_hub"):
        raise StateError("push_to_hub=True: an adapter is saved here, and uploaded by model.push_to_hub(repo_id)")
    if others.get("variant") is not None:
        raise StateError(
            f"variant={others['variant']!r}: an adapter's file has one name, adapter_model.safetensors; leave it out"
        )
    strange = sorted(name for name in others if name not in (*_IDLE, "push_to_hub", "variant"))
    if strange:
        known = ("selected_adapters", "save_embedding_layers", "is_main_process", "state_dict", "save_function", *_IDLE)
        raise StateError(
            f"save_pretrained has no argument {strange[0]!r}; the closest are {nearest(strange[0], known)}"
        )


class Folders(Many):
    """The part of ``PeftModel`` that reads and writes."""

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        expect_sha256: str | None = None,
        allow_other_base: bool = False,
        ignore_mismatched_sizes: bool = False,
        **where: Any,
    ) -> checkpoint.LoadReport:
        """Load an adapter and keep it aside, frozen unless ``is_trainable``; into the one of that name, if there is one (so a run resumes).

        Arguments as of ``from_pretrained``; raises as it.
        """
        if adapter_name in self.peft_config:
            report = checkpoint.restore_adapter(
                self,
                folder_of(model_id, where),
                adapter_name,
                strict,
                expect_sha256,
                allow_other_base,
                key_mapping,
                ignore_mismatched_sizes,
            )
            say_left_out(self, report if ignore_mismatched_sizes else None)
            self.set_requires_grad(adapter_name, is_trainable)
            return report
        stored, values, report = checkpoint.prepare_adapter(
            self,
            folder_of(model_id, where),
            adapter_name,
            strict,
            expect_sha256=expect_sha256,
            allow_other_base=allow_other_base,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        say_left_out(self, report if ignore_mismatched_sizes else None)
        if not autocast_adapter_dtype:
            in_base_dtype(self, values)
        say_changed_base([*self.peft_config.values(), stored.config])
        own = dataclasses.replace(stored.config, inference_mode=not is_trainable)
        place(self, own, adapter_name, values, stored.variant, activate=False, trainable=is_trainable)
        return report

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        state_dict: dict | None = None,
        save_function: Callable[..., Any] | None = None,
        **others: Any,
    ) -> None:
        """Write adapters in PEFT's layout: "default" into the folder itself, others into a folder of their name in it; and a model card.

        With ``path_initial_model_for_weight_conversion``, the folder in which an adapter with a start of its own (PiSSA, OLoRA, CorDA,
        LoRA-GA) was saved before it trained, it is written as a plain LoRA of twice the rank (``peft/plain.py``).

        Args:
            state_dict: the whole model's, as accelerate gathers it, or an average of many steps: what it has of an adapter is taken from
                it. None or an empty one: from the model.
            save_function: what accelerate's users pass, such as ``accelerator.save``. It writes pickles and whole models; an adapter is
                written and sealed here, in one step, as PEFT and transformers write safetensors without it.
            others: arguments of transformers' ``save_pretrained`` that mean nothing for an adapter (``max_shard_size``, ``token``).

        Raises:
            StateError: an argument that would change what is written, and cannot, or that neither library has.
        """
        refuse_unmeant(others, save_function)
        if not isinstance(safe_serialization, bool):
            raise StateError(
                f"safe_serialization={safe_serialization!r}: wanted selected_adapters= by name, as in PEFT"
            )
        if not safe_serialization:
            raise StateError(
                "safe_serialization=False would write a pickle, which runs code when it is read; leave it True"
            )
        if not is_main_process:
            return
        chosen = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        adapters_of(self).check(chosen)
        start = path_initial_model_for_weight_conversion
        if state_dict and start is not None:
            raise StateError(
                "state_dict and path_initial_model_for_weight_conversion: the second reads the adapter from the model; leave one out"
            )
        made = {}
        for name in chosen:
            how = (
                name,
                save_embedding_layers,
                cached(self.peft_config[name].base_model_name_or_path or name_of(self), "config.json"),
            )
            if start is not None:
                made[name] = plain_files(self, start, *how)
            else:
                made[name] = adapter_files(self, *how, given=taken_from(self, name, state_dict or {}))
        for name, files in made.items():
            write_files(save_directory if name == "default" else os.path.join(save_directory, name), files)
        write_card(self, save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write ``README.md``: the base model, the libraries, and tags by which a hub finds the adapter."""
        write_card(self, output_dir)

    def push_to_hub(self, repo_id: str, **fields: Any) -> Any:
        """Save the adapters and upload them to the Hugging Face Hub (``huggingface_hub``); returns what the upload returns."""
        return push(self, repo_id, **fields)
