"""What TRL's trainers are given in the place of what they would look for in PEFT: an adapted model, and a reference made of it.

TRL asks whether a model is PEFT's own, and loads a second base model as reference where it is not. So a trainer that takes a
``ref_model`` is given one, and GRPO and RLOO, which take none, are made as for ``beta=0`` and get both afterwards. Next file:
``hf/trainer.py``.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

import minilora
from minilora.errors import ConfigError, StateError
from minilora.hf.began import Reference, reference
from minilora.lora.config import LoraConfig
from minilora.lora.slots import has_adapters

__all__ = ["Taken", "asked_of", "take_config", "take_reference"]

_BY_BETA = ("GRPOTrainer", "RLOOTrainer")


class Taken:
    """A reference on its way into a trainer: what stands aside while the trainer is made, and is put into it after that."""

    def __init__(self, made: Reference | None = None, args: Any = None) -> None:
        self.made, self.args, self.beta = made, args, getattr(args, "beta", 0.0)

    def __enter__(self) -> None:
        if self.args is not None:
            self.args.beta = 0.0

    def __exit__(self, *_: object) -> None:
        if self.args is not None:
            self.args.beta = self.beta

    def put(self, trainer: Any) -> None:
        """Give a trainer that is made now what stood aside; TRL may have changed the dtype of what trains meanwhile."""
        if self.args is not None:
            trainer.beta, trainer.ref_model = self.beta, self.made
        if self.made is not None:
            self.made.renew()


def asked_of(kind: type, after: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by name, as the first class behind ``after`` that names its ``model`` takes them."""
    for signature in _signatures(kind, after):
        if "model" in signature.parameters:
            bound = signature.bind_partial(None, *args, **kwargs)
            asked = dict(bound.arguments)
            asked.pop(next(iter(signature.parameters)))
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    asked |= asked.pop(parameter.name, {})
            return asked
    raise ConfigError(f"{kind.__name__}: none of its classes takes a model; wanted a Trainer behind {after.__name__}")


def _signatures(kind: type, after: type) -> list[inspect.Signature]:
    line = kind.__mro__[kind.__mro__.index(after) + 1 :]
    return [inspect.signature(vars(cls)["__init__"]) for cls in line if "__init__" in vars(cls)]


def take_config(asked: dict[str, Any]) -> None:
    """Adapt the model as a ``peft_config`` says, before the trainer sees it.

    Raises:
        ConfigError: PEFT's own config, a model that is only named, or one that has adapters.
    """
    config, model = asked.get("peft_config"), asked.get("model")
    if config is None:
        return
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"peft_config is a {type(config).__module__.partition('.')[0]}.{type(config).__name__}, with which TRL makes a model of PEFT; "
            "give minilora.LoraConfig(...) with the same fields, or use TRL's trainer without LoraTrainerMixin"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"peft_config=minilora.LoraConfig(...) wants a loaded model, and model is {model!r}; give "
            f"model=minilora.hf.load_model({model!r})"
        )
    if has_adapters(model):
        raise ConfigError("the model has adapters already, which train; leave peft_config out, or unload() them first")
    asked["model"] = minilora.get_peft_model(model, asked.pop("peft_config"))


def take_reference(kind: type, asked: dict[str, Any]) -> Taken:
    """A reference for a trainer that wants one and was given none, among what is ``asked`` of it or beside it.

    Raises:
        StateError: a setting under which TRL handles a reference of its own.
    """
    model, args = asked.get("model"), asked.get("args")
    trl = [cls for cls in kind.__mro__ if cls.__module__.partition(".")[0] == "trl"]
    by_name = any(
        "ref_model" in inspect.signature(vars(cls)["__init__"]).parameters for cls in trl if "__init__" in vars(cls)
    )
    by_beta = any(cls.__name__ in _BY_BETA for cls in trl)
    if not isinstance(model, nn.Module) or not has_adapters(model) or not (by_name or by_beta):
        return Taken()
    if asked.get("ref_model") is not None:
        _refuse(args, isinstance(asked["ref_model"], Reference))
        return Taken()
    if by_beta and args is None and any(cls.__name__ == "RLOOTrainer" for cls in trl):
        raise StateError("RLOOTrainer without args would load a second model as reference; give args=RLOOConfig(...)")
    if by_beta and not getattr(args, "beta", 0.0):
        return Taken()
    _refuse(args, True)
    made = reference(model)
    if by_name:
        asked["ref_model"] = made
    return Taken(made, args if by_beta else None)


def _refuse(args: Any, ours: bool) -> None:
    if ours and getattr(args, "sync_ref_model", False):
        raise StateError(
            "sync_ref_model=True: the reference is this very model as it began, and has no weights that could follow; set it to False, "
            "or give a ref_model of its own"
        )
    for name in ("deepspeed", "fsdp"):
        if ours and getattr(args, name, None):
            raise StateError(
                f"{name}={getattr(args, name)!r} shards a reference as a model of its own, and this one is the model that trains; give a "
                "ref_model of its own"
            )
