"""Room for larger ranks before a model is compiled, on every kind of layer; and swaps of smaller ones into it."""

import pytest
import torch
from torch import nn

from minilora.errors import CheckpointError, StateError
from minilora.lora.factors import beside, widened
from minilora.peft import LoraConfig, get_peft_model
from minilora.peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.compare import close
from tests.models import finished, randomize

X = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 10, 1, groups=2)
        self.head = nn.Linear(10, 7)

    def forward(self, x):
        return self.head(torch.tanh(self.grouped(torch.tanh(self.conv(x)))).mean((2, 3)))


def adapted(seed=0, **fields):
    torch.manual_seed(0)
    net = finished(Net())
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["conv", "grouped", "head"]} | fields)
    return randomize(get_peft_model(net, config), seed).eval()


def shapes(model):
    return {name.replace(".default", ""): tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True, "rank_pattern": {"conv": 3}}, {"lora_bias": True}], ids=str
)
def test_more_rank_and_the_same_output(fields):
    model = adapted(**fields)
    wanted = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    close(model(X), wanted)
    found, prefix = shapes(model), "base_model.model."
    assert found[f"{prefix}conv.lora_A.weight"] == (6, 6, 3, 3) and found[f"{prefix}conv.lora_B.weight"] == (8, 6, 1, 1)
    assert found[f"{prefix}grouped.lora_A.weight"] == (6, 8, 1, 1)
    assert found[f"{prefix}grouped.lora_B.weight"] == (10, 3, 1, 1)
    config = model.peft_config["default"]
    assert config.r == 6 and set(config.rank_pattern.values()) <= {6}
    close(adapted_again(model)(X), wanted)


def adapted_again(model):
    """What the file of this model computes on the base."""
    import tempfile

    from minilora.peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(0)
        return PeftModel.from_pretrained(finished(Net()), folder)


def test_a_smaller_rank_is_swapped_in_on_every_layer(tmp_path):
    small = adapted(1, r=2, lora_alpha=5)
    small.save_pretrained(tmp_path)
    model = adapted(2)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    places = [p.data_ptr() for p in model.parameters()]
    hotswap_adapter(model, tmp_path)
    close(model(X), small(X))
    assert [p.data_ptr() for p in model.parameters()] == places
    large = adapted(1, r=10)
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(CheckpointError, match="has rank 10, the present adapter 8"):
        hotswap_adapter(model, tmp_path / "large")


def test_what_cannot_be_prepared():
    model = adapted()
    before = shapes(model)
    with pytest.raises(StateError, match=r"groups=2 to target rank 5, .* divisible by 2"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    with pytest.raises(StateError, match=r"target rank 2, but the original rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(StateError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=6)
    assert shapes(model) == before
    with pytest.warns(UserWarning, match="called with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="warn")
    assert shapes(model) != before


def test_a_users_config_is_brought_in_line():
    mine = LoraConfig(r=4, rank_pattern={"conv": 3}, target_modules=["conv"])
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=mine)
    assert (mine.r, mine.rank_pattern) == (6, {"conv": 6})


@pytest.mark.parametrize("groups", [1, 3])
def test_pairs_of_factors(groups):
    """Against the product in each group, in float64."""
    draw = torch.Generator().manual_seed(1)
    A, B = torch.randn(6, 5, generator=draw).double(), torch.randn(9, 6 // groups, generator=draw).double()
    more_A, more_B = torch.randn(3, 5, generator=draw).double(), torch.randn(9, 3 // groups, generator=draw).double()

    def product(A, B):
        return torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])

    close(product(*beside(A, B, more_A, more_B)), product(A, B) + product(more_A, more_B), 1e-12)
    wide = widened(A, B, 12)
    assert wide[0].shape == (12, 5) and wide[1].shape == (9, 12 // groups)
    close(product(*wide), product(A, B), 1e-12)
