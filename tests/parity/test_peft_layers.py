"""Convolutions, embeddings and torch's attention as PEFT adapts them: the same start, files and outputs, both ways."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")

import peft

import minilora
from minilora import LoraConfig
from minilora.lora.slots import adapters_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    # PEFT's check of shapes takes the bias of lora_bias for a broken factor.
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor\(s\) have invalid shape"),
]


class Net(nn.Module):
    """An embedding, a layer of the kind in question, and a head that reads all of it."""

    def __init__(self, layer):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(13, 6), layer, nn.LazyLinear(5)

    def forward(self, ids):
        x = self.table(ids)
        if isinstance(self.layer, nn.ModuleList):  # an attention, under the name that users give it
            x = self.layer[0](x, x, x)[0]
        else:
            dims = self.layer.weight.dim()
            x = x.transpose(1, 2)
            x = self.layer(x.reshape(*x.shape[:2], *{3: (8,), 4: (4, 2), 5: (2, 2, 2)}[dims]))
        return self.head(x.flatten(1))


LAYERS = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2), padding=(2, 1)),
    "conv2d_1x1": lambda: nn.Conv2d(6, 8, 1, bias=False),
    "conv2d_groups": lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1),
    "conv3d": lambda: nn.Conv3d(6, 4, 2, padding=1, stride=2),
    "attention": lambda: nn.ModuleList([nn.MultiheadAttention(6, 3, batch_first=True)]),
}
CASES = {
    **{name: (name, {}) for name in LAYERS},
    **{f"{name} dora": (name, {"use_dora": True}) for name in ("conv1d", "conv2d", "conv2d_1x1", "conv3d")},
    "conv2d rslora": ("conv2d", {"use_rslora": True}),
    "conv2d gaussian": ("conv2d", {"init_lora_weights": "gaussian"}),
    "conv2d random": ("conv2d", {"init_lora_weights": False}),
    "conv2d groups random": ("conv2d_groups", {"init_lora_weights": False}),
    "conv2d lora_bias": ("conv2d", {"lora_bias": True}),
    "attention gaussian": ("attention", {"init_lora_weights": "gaussian"}),
    "attention random": ("attention", {"init_lora_weights": False}),
    "embedding dora": ("conv1d", {"use_dora": True, "target_modules": ["table"]}),
    "embedding dora rslora": ("conv1d", {"use_dora": True, "use_rslora": True, "target_modules": ["table"]}),
    "embedding pissa": ("conv1d", {"init_lora_weights": "pissa", "target_modules": ["table", "head"]}),
    "embedding olora": ("conv1d", {"init_lora_weights": "olora", "target_modules": ["table"]}),
    "embedding orthogonal": ("conv1d", {"init_lora_weights": "orthogonal", "target_modules": ["table"]}),
}
every_case = pytest.mark.parametrize("case", CASES)
IDS = torch.randint(0, 13, (3, 8), generator=torch.Generator().manual_seed(3))


def build(name):
    torch.manual_seed(1)
    net = Net(LAYERS[name]()).eval()
    with torch.no_grad():
        net(IDS)
    return net


def fields_of(case):
    name, fields = CASES[case]
    target = ["layer.0"] if name == "attention" else ["layer"]
    return {"r": 4, "lora_alpha": 6, "target_modules": target} | fields


def pair(case):
    """The same model adapted by both, from one seed."""
    name, fields = CASES[case][0], fields_of(case)
    torch.manual_seed(4)
    ours = minilora.get_peft_model(build(name), LoraConfig(**fields))
    torch.manual_seed(4)
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**fields))
    return ours.eval(), theirs.eval()


def scattered(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in sorted(minilora.get_peft_model_state_dict(model).items()):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def once(model):
    """Without the update of an attention's output projection, which PEFT counts twice (below)."""
    with torch.no_grad():
        for key, tensor in minilora.get_peft_model_state_dict(model).items():
            if "out_proj" in key:
                tensor.zero_()
    return model


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@every_case
def test_the_start_is_the_same(case):
    ours, theirs = pair(case)
    mine, other = minilora.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        if "magnitude" in key or "pissa" in case:
            close(tensor, other[key])
        else:
            assert torch.equal(tensor, other[key]), key


@every_case
def test_our_file_in_peft_and_theirs_here(case, tmp_path):
    name, fields = CASES[case][0], fields_of(case)
    ours = once(scattered(minilora.get_peft_model(build(name), LoraConfig(**fields)))).eval()
    want = ours(IDS)
    assert (want - build(name)(IDS)).abs().max() > 0.05
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
        close(theirs(IDS), want)
        theirs.save_pretrained(tmp_path / "theirs")
    back = minilora.PeftModel.from_pretrained(build(name), tmp_path / "theirs").eval()
    close(back(IDS), want)


@every_case
def test_merged_weights_are_the_same(case, tmp_path):
    name, fields = CASES[case][0], fields_of(case)
    ours = once(scattered(minilora.get_peft_model(build(name), LoraConfig(**fields)))).eval()
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path)
    merged = ours.merge_and_unload()
    if "groups" in name:
        with pytest.raises(NotImplementedError, match="groups > 1"):
            theirs.merge_and_unload()
        assert merged.layer.groups == 1
        return close(merged(IDS), theirs(IDS))
    other = theirs.merge_and_unload().state_dict()
    for key, tensor in merged.state_dict().items():
        close(tensor, other[key])


@pytest.mark.parametrize("case", ["conv1d", "conv2d dora", "conv2d_groups", "conv3d", "embedding dora"])
def test_training_steps_are_the_same(case):
    ours, theirs = pair(case)
    goal = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(model(IDS), goal).backward()
            optimizer.step()
    mine, other = minilora.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=2e-4)


def test_the_output_projection_counts_once_here_and_twice_in_peft(tmp_path):
    """PEFT adds the update of ``out_proj`` to the weight and then merges the layer, which adds it again."""
    ours = scattered(minilora.get_peft_model(build("attention"), LoraConfig(**fields_of("attention")))).eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("attention"), tmp_path).eval()
    assert (theirs(IDS) - ours(IDS)).abs().max() > 0.01
    with torch.no_grad():
        adapters_of(ours).named("default")["layer.0.out_proj"].lora_B.mul_(2)
    close(theirs(IDS), ours(IDS))


def test_dilation_and_padding_modes_go_with_the_layer():
    """PEFT leaves both out of lora_A: with a dilation its forward fails, with a padding mode it is not what it merges."""
    x, fields = torch.randn(2, 3, 9), {"r": 4, "target_modules": ["0"], "init_lora_weights": False}
    dilated = nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2))
    with pytest.raises(RuntimeError, match="size of tensor"):
        peft.get_peft_model(dilated, peft.LoraConfig(**fields))(x)
    padded = peft.get_peft_model(
        nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")), peft.LoraConfig(**fields)
    )
    padded.eval()
    before = padded(x)
    assert (padded.merge_and_unload()(x) - before).abs().max() > 1e-3
