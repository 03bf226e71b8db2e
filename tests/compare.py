"""Is what was found what was wanted? Used by tests of several rooms."""

import hashlib

import torch
from torch import nn


def close(got, want, tolerance=1e-5):
    """Within ``tolerance`` of the largest wanted value."""
    far = (got.detach().double() - want.detach().double()).abs().max() / want.detach().double().abs().max()
    assert far < tolerance, f"off by {far:.1e} of the largest value"


def same(left, right):
    """Whether two dictionaries hold equal tensors, dtypes included, under the same names."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def snapshot(model):
    """Its class, every place and what object sits there, what trains, and a hash of every tensor.

    Two snapshots of one model are equal exactly if nothing happened to it between them.
    """
    return {
        "class": type(model),
        "attributes": sorted(model.__dict__),
        "places": [(path, id(m), m.training) for path, m in nn.Module.named_modules(model, remove_duplicate=False)],
        "trains": [(path, id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)],
        "tensors": {key: _digest(tensor) for key, tensor in model.state_dict().items()},
    }


def _digest(tensor):
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha1(raw.numpy().tobytes()).hexdigest()


def saved_bytes(function, leave_out=()):
    """Bytes of all that autograd keeps for the backward pass of ``function()``, each storage once; not those of ``leave_out``."""
    known, storages = {tensor.untyped_storage().data_ptr() for tensor in leave_out}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for place, storage in storages.items() if place not in known)
