"""ggml's own quantizers, by ctypes out of the library that ``xllamacpp`` brings: what ``llama-quantize`` packs a weight with."""

import ctypes
from pathlib import Path

import torch

from minilora.quant.gguf.formats import FORMATS


def quantized(weight, kind, importance=None):
    """Blocks ``[n, nbytes]`` of a fp32 matrix, weighed by the ``importance`` of each column where it is given (an imatrix)."""
    import gguf
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    pack, number, form = library.ggml_quantize_chunk, int(gguf.GGMLQuantizationType[kind]), FORMATS[kind]
    pack.restype, whole = ctypes.c_size_t, ctypes.c_int64
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole, ctypes.c_void_p]
    library.ggml_quantize_init(number)
    flat = weight.float().contiguous().view(-1, weight.shape[-1])
    packed = torch.empty(flat.numel() // form.weights, form.nbytes, dtype=torch.uint8)
    weighed = None if importance is None else importance.contiguous().data_ptr()
    assert pack(number, flat.data_ptr(), packed.data_ptr(), 0, *flat.shape, weighed) == packed.numel()
    return packed
