"""EVA (Paischer et al. 2024, arXiv 2410.07170, section 3): A starts as the directions in which a layer's inputs vary most.

The inputs of each layer go, batch by batch, through an incremental principal component analysis (Ross et al. 2008, section 3.1), until the
directions of two batches agree. Then the ranks are given out: the directions of all layers that explain most of their layer's variance
get one each, so a layer may end with more ranks than it had, or none. B stays zero, so the model begins unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.errors import ConfigError, DataError, KindError, StateError, warn
from minilora.linear.layers import in_out_features, is_linear
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.inject import build, place_in
from minilora.lora.layer import LoRALinear
from minilora.lora.match import match, targets_of
from minilora.lora.slots import adapters_of, has_adapters, unwrapped
from minilora.lora.starts import EvaConfig
from minilora.many.principal import Principal

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights"]

_MOST_BATCHES = 100_000


def tokens_that_count(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """``[n, 2]`` places (row, token) of a batch of language: those of ``attention_mask`` whose label is not masked."""
    if not isinstance(model_input, Mapping):
        raise KindError(
            f"EVA: a batch is a {type(model_input).__name__}; wanted a dict, or prepare_model_inputs_fn=None"
        )
    settings = peft_config.eva_config or EvaConfig()
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def rows_that_count(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """``[n, in]`` of a layer's input ``[batch, tokens, in]``: the places that ``tokens_that_count`` found."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def _tensor(layer_input: Any, name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(found, Tensor):
        raise KindError(
            f"EVA: {name} gets a {type(found).__name__}; give a prepare_layer_inputs_fn that makes [n, in] of it"
        )
    return found


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = _call,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = tokens_that_count,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = rows_that_count,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """What A of each layer starts from, by path: ``[rank, in]`` fp32. The model runs in eval mode, without adapters, and stays as it is.

    Args:
        dataloader: batches, gone through again until all directions agree.
        peft_config: which layers; for a model without adapters. forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: makes of batch and config what ``prepare_layer_inputs_fn`` gets as its second argument.
        prepare_layer_inputs_fn: makes ``[n, in]`` of a layer's input, that, and the layer's path; or a dict by path. None flattens.
        gather_distributed_inputs: of several processes; not offered, so set it to False there and give all the same data.
        show_progress_bar: print how many layers agree.

    Raises:
        ConfigError: no config. DataError: no batch, or batches too small. StateError: several processes, or directions that never agree.
    """
    if peft_config is None and not has_adapters(model):
        raise ConfigError("peft_config is required if the model has no adapters")
    if dist.is_available() and dist.is_initialized() and gather_distributed_inputs:
        raise StateError("EVA runs on one process; pass gather_distributed_inputs=False and the same data to each")
    config = peft_config or adapters_of(model).configs[adapter_name]
    tau, rho = (config.eva_config or EvaConfig()).tau, (config.eva_config or EvaConfig()).rho
    bare = Bare(model)
    paths = [path for path in match(model, config).targets if is_linear(bare.get_submodule(path))]
    functions = prepare_layer_inputs_fn if isinstance(prepare_layer_inputs_fn, Mapping) else None
    if functions is not None and (odd := sorted(set(functions) - set(paths))):
        raise ConfigError(f"prepare_layer_inputs_fn is a mapping but {odd[0]} is no layer that the config adapts")
    ranks = {path: config.for_module(path)[0] for path in paths}
    sizes = {path: min(round(r * rho), in_out_features(bare.get_submodule(path))[0]) for path, r in ranks.items()}
    seen: dict[str, Tensor] = {}
    about: list[Any] = [None]

    def listen(path: str) -> Any:
        make = functions.get(path) if functions is not None else prepare_layer_inputs_fn

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if path in wanted:
                x = make(inputs, about[0], path) if make is not None else _tensor(inputs, path)  # type: ignore[operator]
                seen[path] = x.reshape(-1, x.shape[-1])

        return hook

    wanted = set(paths)

    def run(batch: Any) -> None:
        seen.clear()
        place = next((p.device for p in unwrapped(model).parameters() if p.device.type != "meta"), None)
        batch = _moved(batch, place)
        about[0] = prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn is not None else batch
        forward_fn(model, batch)

    change = Change()
    with adapters_of(model).bare() if has_adapters(model) else nullcontext():
        try:
            for path in paths:
                stands = unwrapped(model).get_submodule(
                    path
                )  # the layer, or the face before it, which is what gets called
                change.item(stands._forward_pre_hooks, "minilora.eva", listen(path))  # type: ignore[arg-type]
            change.train(unwrapped(model), False)
            first = next(iter(dataloader), None)
            if first is None:
                raise DataError("dataloader is empty; give EVA at least one batch")
            run(first)
            twin = _twins(seen)
            sizes |= {path: max(sizes[other] for other in paths if twin[other] == twin[path]) for path in paths}
            found = {path: Principal(sizes[path], tau) for path in paths if twin[path] == path}
            given = dict(sizes)
            for at, batch in enumerate(cycle(dataloader)):
                wanted = {path for path, each in found.items() if not each.agrees(given[path])}
                if show_progress_bar:
                    print(
                        f"EVA: {sum(twin[path] not in wanted for path in paths)} of {len(paths)} layers have converged"
                    )
                if not wanted:
                    break
                if at >= _MOST_BATCHES:
                    raise StateError(f"EVA: {sorted(wanted)[0]} does not settle; lower tau, which is {tau}")
                run(batch)
                fits = [found[path].add(seen[path].float()) for path in wanted if path in seen]
                if not any(fits):
                    raise DataError(
                        "EVA: a batch has fewer tokens than a layer has directions; give larger batches, or lower r or rho"
                    )
                if all(each.ready for each in found.values()):
                    given = _given_out(found, twin, sizes, sum(ranks.values()))
        finally:
            change.take_back()
    whiten = (config.eva_config or EvaConfig()).whiten
    return {path: found[twin[path]].first(rank, whiten) for path, rank in given.items()}


def _moved(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    return type(value)(_moved(each, device) for each in value) if isinstance(value, (tuple, list)) else value


def _twins(seen: Mapping[str, Tensor]) -> dict[str, str]:
    """Each path to the first one that gets the same input."""
    first: dict[int, str] = {}
    return {path: first.setdefault(hash(x.detach().cpu().float().numpy().tobytes()), path) for path, x in seen.items()}


def _given_out(
    found: Mapping[str, Principal], twin: Mapping[str, str], sizes: Mapping[str, int], budget: int
) -> dict[str, int]:
    """How many ranks each layer gets of a budget; of layers with the same input the one that is measured gets most."""
    order = sorted(twin, key=lambda path: twin[path] != path)
    shares = [(path, share) for path in order for share in found[twin[path]].explained[: sizes[path]].tolist()]
    best = torch.tensor([share for _, share in shares]).argsort(descending=True)[:budget].tolist()
    counts = dict.fromkeys(order, 0)
    for at in best:
        counts[shares[at][0]] += 1
    for path in order:
        if twin[path] != path and counts[path] > counts[twin[path]]:
            counts[path], counts[twin[path]] = counts[twin[path]], counts[path]
    return counts


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    **words: Any,
) -> None:
    """Start an adapter that was injected with ``init_lora_weights="eva"``: new ranks, A from the data or a dictionary, B = 0.

    Args:
        dataloader, words: as for ``get_eva_state_dict``; not needed with ``eva_state_dict``, which that returned.

    Raises:
        StateError: no such adapter, several active ones, another start value, or neither data nor dictionary. Nothing has changed then.
    """
    record = adapters_of(model)
    old = record.named(adapter_name)
    config = record.configs[adapter_name]
    if len(record.active) > 1:
        raise StateError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter; set_adapter first"
        )
    if config.init_lora_weights != "eva":
        raise StateError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`; inject it with that"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise StateError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(model, dataloader, adapter_name=adapter_name, **words)
    low = [
        path for path, value in old.items() if isinstance(value, LoRALinear) and value.on not in ("experts", "router")
    ]
    missing = [path for path in low if path not in eva_state_dict]
    kept = [path for path in low if path in missing or len(eva_state_dict[path])]
    ranks, alphas = {}, {}
    for path in kept:
        r, alpha = config.for_module(path)
        ranks[path] = r if path in missing else len(eva_state_dict[path])
        adjusts = config.eva_config is None or config.eva_config.adjust_scaling_factors
        alphas[path] = alpha * ranks[path] / r if adjusts else alpha
    others = [path for path in old if path not in low and getattr(old[path], "targeted", False)]
    plain = all(ranks[path] == config.r and alphas[path] == config.lora_alpha for path in kept)
    new = dataclasses.replace(
        config,
        **targets_of(Bare(model), (*kept, *others)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={} if plain else dict(sorted(ranks.items(), key=lambda item: -len(item[0]))),
        alpha_pattern={} if plain else dict(sorted(alphas.items(), key=lambda item: -len(item[0]))),
    )
    values = build(model, new, "eva-" + adapter_name[:56])
    for path, value in values.items():
        if path in kept and path not in missing:
            value.lora_A.copy_(eva_state_dict[path])  # type: ignore[union-attr, operator]
        elif path not in low:
            values[path] = old[path]
    active, trains = adapter_name in record.active, any(p.requires_grad for v in old.values() for p in _parameters(v))
    with LOCK, Change() as change:
        record.forget(change, adapter_name)
        if active:
            change.put(record, "chosen", ())
        place_in(change, model, new, adapter_name, values, activate=active, trainable=trains)
    if missing:
        warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva state_dict: "
            f"{missing}"
        )


def _parameters(value: Any) -> Iterable[nn.Parameter]:
    return [value] if isinstance(value, nn.Parameter) else value.parameters()
