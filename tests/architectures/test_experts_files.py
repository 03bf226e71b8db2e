"""Files of adapters on experts: what is told of them, what PEFT makes of them, and what minilora makes of PEFT's."""

import copy
import dataclasses
import types
import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

import minilora
from minilora.errors import CheckpointError, ConfigError
from minilora.job.info import look
from minilora.job.told import say_adapted
from minilora.store.adapter_files import read_adapter
from minilora.store.contents import layers_in
from tests.architectures import batches, checks, tiny

NAMES = {
    "gpt_oss": ["experts.down_proj", "experts.gate_up_proj"],
    "llama4_text": ["experts.down_proj", "experts.gate_up_proj"],
    "nemotron_h": ["experts.up_proj"],
    "jetmoe": ["mlp.input_linear.weight"],
}


def adapted(model_type, **fields):
    config = minilora.LoraConfig(r=3, lora_alpha=7, target_parameters=NAMES[model_type], **fields)
    return checks.randomize(minilora.inject(tiny.build(model_type), config))


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize("model_type", NAMES)
def test_what_is_in_a_file_is_told(model_type, start, tmp_path):
    model = adapted(model_type, init_lora_weights=start, rank_pattern={NAMES[model_type][0].rpartition(".")[2]: 2})
    minilora.save_adapter(model, tmp_path)
    found = {layer.path: layer for layer in layers_in(read_adapter(tmp_path))}
    held = checks.adapters(model)
    assert found.keys() == held.keys()
    for path, adapter in held.items():
        assert (found[path].r, found[path].scaling, found[path].untrained) == (adapter.r, adapter.scaling, False)
        wanted = pytest.approx(float(adapter.delta_weight().detach().norm()), rel=1e-4)
        assert found[path].norm == (wanted if start is True else None)  # what PiSSA started from is not in the file
    assert look(tmp_path)["ranks"].keys() == {str(adapter.r) for adapter in held.values()} >= {"2"}


def test_a_router_and_a_linear_layer_beside_experts_are_told(tmp_path):
    config = minilora.LoraConfig(
        r=3, target_parameters=["experts.down_proj", "router.weight"], target_modules=["o_proj"]
    )
    model = checks.randomize(minilora.inject(tiny.build("gpt_oss"), config))
    minilora.save_adapter(model, tmp_path)
    assert {layer.path for layer in layers_in(read_adapter(tmp_path))} == set(checks.adapters(model))


@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss"])
def test_the_tensors_lie_as_peft_lays_them(model_type, tmp_path):
    """Llama 4 does not say that it is transposed: PEFT's A is over what comes out of a projection."""
    model = adapted(model_type)
    theirs = peft.get_peft_model(
        tiny.build(model_type), peft.LoraConfig(r=3, lora_alpha=7, target_parameters=NAMES[model_type])
    )
    wanted = {key: tensor.shape for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    minilora.save_adapter(model, tmp_path)
    tensors = read_adapter(tmp_path).tensors
    assert {key: tensor.shape for key, tensor in tensors.items()} == wanted
    A = next(tensor for key, tensor in tensors.items() if key.endswith("base_layer.lora_A.weight"))
    assert A.shape == (4 * 3, 192 if model_type == "llama4_text" else 64)
    assert not any(adapter.lora_B.any() for adapter in checks.adapters(minilora.inject(tiny.build(model_type), dataclasses.replace(
        minilora.LoraConfig(r=3), target_parameters=NAMES[model_type]))).values())  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_an_adapter_that_peft_made_of_layers_that_were_experts_once(model_type, tmp_path):
    """PEFT takes ``gate_proj`` and ``up_proj`` for one parameter of twice the rank, and writes that as an expression."""
    names = ["q_proj", *(("gate_proj", "up_proj", "down_proj") if model_type == "qwen3_moe" else ("w1", "w2", "w3"))]
    bare = tiny.build(model_type)
    batch = batches.batch_for(bare)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=names, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that its own pattern matches nothing, and goes by it
        theirs = peft.get_peft_model(copy.deepcopy(bare), config).eval()
    theirs.save_pretrained(tmp_path)
    assert theirs.peft_config["default"].rank_pattern == {r".*\.gate_up_proj": 6}
    model = copy.deepcopy(bare)
    minilora.load_adapter(model, tmp_path)
    held = checks.adapters(model)
    assert {adapter.r for path, adapter in held.items() if path.endswith("gate_up_proj")} == {6}
    checks.equal(checks.call(model, batch), checks.call(theirs, batch), 1e-5, "PEFT's conversion")
    minilora.save_adapter(model, tmp_path / "again")
    again = copy.deepcopy(bare)
    minilora.load_adapter(again, tmp_path / "again")
    assert checks.far(checks.call(again, batch), checks.call(model, batch)) == 0


def test_an_expression_that_is_more_than_a_name_stays_refused(tmp_path):
    minilora.save_adapter(adapted("gpt_oss", rank_pattern={"down_proj": 2}), tmp_path)
    (tmp_path / "minilora.json").unlink()
    place = tmp_path / "adapter_config.json"
    for key in (r".*\.(up|down)_proj", r"(a+)+\.down_proj"):
        place.write_text(place.read_text().replace('"down_proj": 2', f'"{key}": 2'.replace("\\", "\\\\")))
        with pytest.raises((CheckpointError, ConfigError), match="is a regular expression"):
            minilora.load_adapter(tiny.build("gpt_oss"), tmp_path)
        place.write_text(place.read_text().replace(f'"{key}": 2'.replace("\\", "\\\\"), '"down_proj": 2'))
    minilora.load_adapter(tiny.build("gpt_oss"), tmp_path)


def test_dbrx_in_peft_is_one_matrix_and_neither_reads_the_others_file(tmp_path):
    """PEFT sees ``[E * I, H]``, so one A for all experts; and its wrapper stands where the model reads three matrices, and has none."""
    bare = tiny.build("dbrx")
    theirs = peft.get_peft_model(
        copy.deepcopy(bare),
        peft.LoraConfig(r=4, lora_alpha=7, target_parameters=["mlp.w1"], init_lora_weights=False),
    )
    batch = batches.batch_for(bare)
    with pytest.raises(AttributeError, match="v1"):
        checks.call(theirs, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"size mismatch: .*mlp\.lora_A\.weight is"):
        minilora.load_adapter(bare, tmp_path / "theirs")
    model = minilora.inject(copy.deepcopy(bare), minilora.LoraConfig(r=4, lora_alpha=7, target_parameters=["mlp.w1"]))
    minilora.save_adapter(checks.randomize(model), tmp_path / "ours")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path / "ours"))
    minilora.load_adapter(bare, tmp_path / "ours")
    assert checks.far(checks.call(bare, batch), checks.call(model, batch)) == 0


def test_how_much_of_a_model_a_folder_covers(tmp_path):
    bare = tiny.build("mixtral")
    bare.save_pretrained(tmp_path / "base")
    for names, covered in ((NAMES["gpt_oss"], 4), (["gate.weight", "q_proj.weight"], 4)):
        config = minilora.LoraConfig(target_parameters=names, base_model_name_or_path=str(tmp_path / "base"))
        minilora.save_adapter(minilora.inject(copy.deepcopy(bare), config), tmp_path / "mine")
        told = look(tmp_path / "mine")["layers"]
        assert (told["covered"], told["of"]) == (covered, 15)
        assert ("down_proj" in told["without"]) == (names is not NAMES["gpt_oss"]) and "lm_head" in told["without"]


def test_a_run_says_whether_the_experts_are_adapted():
    job = types.SimpleNamespace(training=types.SimpleNamespace(steps=3))
    none = (
        "the experts stay as they are: none of their 4 weights ('down_proj', 'gate_up_proj') has an adapter; --target-modules all-linear "
        "has them all, --target-parameters names some"
    )
    for names, last in (
        ("all-linear", "the adapter covers 12 of 15 linear weights, experts included; not gate.weight, lm_head"),
        (["q_proj"], none),
    ):
        said: list[str] = []
        say_adapted(job, minilora.inject(tiny.build("mixtral"), minilora.LoraConfig(target_modules=names)), said.append)
        assert said[-1] == last and all("\n" not in line for line in said)
