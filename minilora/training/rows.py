"""A model whose blocks are in shards from the start: of every weight that is read, a process keeps its own rows at once.

Reading goes on as for a whole model, weight by weight. What has been read (and packed, for which the whole weight is needed) is handed
to ``Rows.keep``, which copies this process's rows out of it, so that the rest is let go before the next weight comes. At the end the
blocks become FSDP2's with these rows. So a process holds its share of the blocks, what is outside of them, and one weight. Next file:
``training/loop.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.lora.adapter import VARIANTS
from minilora.lora.config import LoraConfig
from minilora.lora.match import Match
from minilora.training.processes import Processes
from minilora.training.sharding import blocks_of, refuse_skipping, shard_blocks

__all__ = ["Rows", "why_read_whole"]


def why_read_whole(paper: nn.Module, config: LoraConfig, found: Match) -> str | None:
    """Why each process must read the whole model before it keeps its part, in words; None where it need not.

    Args:
        paper: the model without memory. found: what ``config`` means on it.

    Raises:
        StateError: the model has no blocks, or leaves some out at random.
    """
    refuse_skipping(paper)
    names = _in_blocks(paper)
    if VARIANTS[config.variant].replaces_base:
        return f"{config.variant} packs the dense weights itself"
    for field, paths in (("modules_to_save", found.saved), ("bias", found.biases)):
        for path in paths:
            if any(name == path or name.startswith(f"{path}.") for name in names):
                return f"{field} copies {path}, which lies in a block"
    seen: dict[int, str] = {}
    for name, parameter in paper.named_parameters(remove_duplicate=False):
        if seen.setdefault(id(parameter), name) != name and (name in names or seen[id(parameter)] in names):
            return f"{seen[id(parameter)]} and {name} are one weight"
    return None


class Rows:
    """The rows of one process of the weights in a model's blocks: ``expect``, then ``keep`` for each weight, then ``shard``.

    Args:
        processes: which process this is, and of how many. dtype: what the model is read in.
    """

    def __init__(self, processes: Processes, dtype: torch.dtype) -> None:
        self.processes, self.dtype = processes, dtype
        self._expected: dict[str, torch.Size] = {}
        self._whole: dict[str, torch.Size] = {}  # of what was cut

    def __deepcopy__(self, memo: Any) -> Rows:
        return self  # transformers copies configs, and what is noted here must come back

    def expect(self, model: nn.Module) -> None:
        """Look where the weights of a model without memory are that will be cut: in its blocks, and no vectors, which are small.

        One in another dtype is not cut either: transformers reads it in that dtype where nobody asks for it.
        """
        names = _in_blocks(model)
        self._expected = {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if name in names and parameter.dim() > 1 and parameter.dtype == self.dtype
        }

    def expects(self, name: str) -> bool:
        """Whether the weight of this name is to be cut."""
        return name in self._expected

    def keep(self, name: str, weight: Tensor) -> Tensor:
        """This process's rows of a dense weight: a copy. Raises ``CheckpointError`` where its shape is not the model's."""
        if weight.shape != (wanted := self._expected[name]):
            raise CheckpointError(
                f"{name}: is {list(weight.shape)}, the model wants {list(wanted)}; the weights do not fit config.json"
            )
        return self._cut(name, weight)

    def keep_packed(self, weight: str, layer: nn.Module) -> None:
        """The same of the codes and scales of a packed layer, in place, whose dense weight has this name; nothing for one in no block."""
        path = weight.removesuffix(".weight")
        for name, values in list(layer._parameters.items()):
            if values is not None and name != "bias" and self.expects(weight):
                own = self._cut(f"{path}.{name}", values.detach())
                layer._parameters[name] = nn.Parameter(own, requires_grad=False)

    def _cut(self, name: str, values: Tensor) -> Tensor:
        """As FSDP2 cuts: neighbouring rows, as many for each process, and fewer or none for the last ones."""
        self._whole[name] = values.shape
        share = -(-len(values) // self.processes.size)
        return values[self.processes.rank * share :][:share].clone(memory_format=torch.contiguous_format)

    def shard(self, model: nn.Module) -> None:
        """Make the blocks FSDP2's, of the rows that were kept and of what was not cut. In place; all of them are frozen."""
        kept = {}
        for name, shape in self._whole.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            rows: Any = module._parameters[own]
            kept[name] = rows.detach()
            whole = torch.empty(shape, dtype=rows.dtype, device="meta")
            module._parameters[own] = nn.Parameter(whole, requires_grad=False)
        for block in blocks_of(model):
            block.requires_grad_(False)
        shard_blocks(model, self.processes)
        for name, rows in kept.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            if own in module._modules:  # of experts, whose weight has become a layer
                module, own = module.get_submodule(own), "weight"
            empty: Any = module._parameters[own]
            place = {"shape": empty.shape, "stride": empty.stride(), "run_check": False}
            filled = type(empty).from_local(rows, empty.device_mesh, empty.placements, **place)
            module._parameters[own] = nn.Parameter(filled, requires_grad=False)


def _in_blocks(model: nn.Module) -> set[str]:
    """Names of the parameters in a model's blocks."""
    blocks = {id(block) for block in blocks_of(model)}
    paths = [path for path, module in model.named_modules() if id(module) in blocks]
    return {f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_parameters()}
