"""NaN or infinity in a tensor: found wherever it stands, in every dtype and layout, with no memory of the tensor's size."""

import itertools
import subprocess
import sys

import pytest
import torch

from minilora.quant import finite
from minilora.quant.finite import is_finite

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]
BAD = [float("nan"), float("inf"), float("-inf")]
LAYOUTS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, 2),
    "every second": lambda t: t[:, ::2, 1::2],
    "a slice": lambda t: t[1:, 1:3],
    "expanded": lambda t: t[:, :1].expand(-1, 4, -1),
    "one row": lambda t: t[0, 0],
    "one value": lambda t: t[1, 2, 3],
}


@pytest.fixture(params=[1 << 18, 7], ids=["in one", "in pieces"])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_bad_value_is_found_at_every_place(dtype, layout):
    values = torch.randn(3, 5, 9).to(dtype)
    for place, bad in itertools.product(itertools.product(range(3), range(5), range(9)), BAD):
        spoilt = values.clone()
        spoilt[place] = bad
        seen = LAYOUTS[layout](spoilt)
        assert is_finite(seen) is bool(torch.isfinite(seen).all()), (place, bad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_value_is_found_in_a_long_tensor(dtype, bad):
    """Where vectors and threads share the work: the ends, the middle and the places around them."""
    for count in (100_003, 1 << 17):
        values = torch.zeros(count, dtype=dtype)
        for place in (0, 1, 31, 32, count // 2 - 1, count // 2, count - 33, count - 2, count - 1):
            values[place] = bad
            assert not is_finite(values), (count, place)
            values[place] = 0
        assert is_finite(values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_and_the_smallest_numbers_are_finite(dtype):
    info = torch.finfo(dtype)
    assert is_finite(torch.tensor([info.max, info.min, info.tiny, -0.0, 0.0] * 999, dtype=dtype))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_read_byte_by_byte(dtype):
    for byte in range(256):
        values = torch.full((4, 11), 0x10, dtype=torch.uint8)
        assert is_finite(values.view(dtype))
        values[2, 3] = byte
        seen = values.view(dtype)
        assert is_finite(seen) is bool(torch.isfinite(seen.float()).all()), byte
        assert is_finite(seen.t()) is is_finite(seen)


def test_complex_numbers_have_two_parts():
    values = torch.randn(4, 3, dtype=torch.complex64)
    assert is_finite(values) and is_finite(values.conj().t())
    for bad in (complex(float("nan"), 0), complex(0, float("inf"))):
        values[1, 2] = bad
        assert not is_finite(values) and not is_finite(values.conj())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integers_are_finite(dtype):
    assert is_finite(torch.ones(5, 3, dtype=dtype))


@pytest.mark.parametrize(
    "tensor", [torch.empty(0), torch.empty(3, 0, 2), torch.empty(4, 5, device="meta")], ids=["empty", "no rows", "meta"]
)
def test_what_holds_no_value_is_finite(tensor):
    assert is_finite(tensor) is True


def test_a_parameter_is_looked_at():
    assert is_finite(torch.nn.Parameter(torch.ones(3, 2))) and not is_finite(torch.nn.Parameter(torch.ones(3, 2) / 0))


class Sharded(torch.Tensor):
    """As a DTensor: what it is in all is asked by the element-wise functions and ``all``, never by the least and the largest."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.aminmax:
            raise AssertionError("NaN of another rank may be lost")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("bad", BAD)
def test_a_tensor_of_another_class_answers_itself(bad):
    values = torch.ones(4, 6).as_subclass(Sharded)
    assert is_finite(values)
    values[3, 1] = bad
    assert not is_finite(values)


PEAK = """
import sys
import torch
from minilora.quant.finite import is_finite

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

torch.set_num_threads(1)
tensor = torch.ones(2048, 4096, dtype=getattr(torch, sys.argv[1]))
tensor = {"whole": tensor, "turned": tensor.t(), "cut": tensor[:, :4000]}[sys.argv[2]]
small = tensor[:9, :8]
is_finite(small), is_finite(small.contiguous())
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
is_finite(tensor)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["whole", "turned", "cut"])
def test_no_memory_of_the_tensors_size_is_taken(dtype, how):
    """A mask would be 8 MB, a copy 16 or 32, one in float64 64; pieces that are copied have up to 1."""
    done = subprocess.run([sys.executable, "-c", PEAK, dtype, how], capture_output=True, text=True, check=True)
    assert float(done.stdout) < {"whole": 2, "turned": 2, "cut": 10}[how]
