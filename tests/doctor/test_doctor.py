"""``minilora doctor``: every finding provoked in a folder that PEFT wrote, each absent from the healthy one; folders of other programs."""

import hashlib
import json
import os
import shutil
import time

import pytest
import safetensors.torch
import torch

from minilora import LoraConfig, inject, load_adapter, save_adapter
from minilora.cli import main
from minilora.doctor.examine import examine
from minilora.errors import CheckpointError
from minilora.export.folders import export_folder
from minilora.store.adapter_files import read_adapter
from tests import mixtures, models

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
PROBE = {"probe.json": "{}"}
pytestmark = pytest.mark.filterwarnings(
    "ignore::peft.utils.warning.PeftWarning", "ignore:Setting `save_embedding_layers`"
)


def peft_folder(place, **fields):
    """An adapter of PEFT's with random factors, for a base that is on no disk here."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], **fields})
    model = peft.get_peft_model(models.llama(), config)
    models.randomize(model)
    model.save_pretrained(place)
    change(place, base_model_name_or_path="no/where", revision="5f3a")
    return place


def change(place, **fields):
    """Set fields of the config; ``...`` takes one away."""
    content = json.loads((place / CONFIG).read_text()) | fields
    (place / CONFIG).write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def tensors(place, how):
    """Put the file's tensors through a function of the dictionary."""
    held = safetensors.torch.load_file(place / WEIGHTS)
    safetensors.torch.save_file({k: t.contiguous() for k, t in how(held).items()}, place / WEIGHTS, {"format": "pt"})


def files(place, contents):
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    place = peft_folder(tmp_path_factory.mktemp("whole") / "a")
    files(place, PROBE)
    return place


@pytest.fixture
def healthy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "a")


def found(place, **more):
    """``{check: severity}``, the first of each."""
    findings = examine(place, **more).findings
    return {finding.check: finding.severity for finding in reversed(findings)}


def test_a_healthy_folder_has_no_finding(healthy):
    examined = examine(healthy)
    assert not examined.findings and examined.healthy and "by PEFT 0.21" in examined.kind
    assert examined.facts["layers"] == "4: up_proj, q_proj in blocks 0 to 1"
    assert examined.facts["rank"] == "3; scaling 4 (lora_alpha 12)"


def renamed(old, new):
    return lambda held: {key.replace(old, new): tensor for key, tensor in held.items()}


def put(**values):
    """Fill the tensors whose names end so."""

    def how(held):
        for ending, value in values.items():
            for key in held:
                if key.endswith(ending.replace("__", ".")):
                    held[key] = torch.full_like(held[key], value)
        return held

    return how


def without(ending):
    return lambda held: {key: tensor for key, tensor in held.items() if not key.endswith(ending)}


def one(key, tensor):
    return lambda held: {**held, key: tensor}


DEPTH = "base_model.model."
# What is done to the tensors, which check sees it, how bad it is, words of the sentence.
TENSORS = [
    (put(lora_B__weight=0.0), "untrained", "fault", "all 4 layers change nothing: B is still zero:"),
    (put(lora_B__weight=0.0, lora_A__weight=0.0), "untrained", "fault", "A too"),
    (put(q_proj__lora_B__weight=0.0), "untrained", "warning", "2 of 4 layers change nothing"),
    (put(q_proj__lora_A__weight=0.0), "untrained", "warning", "2 of 4 layers change nothing"),
    (one(f"{Q0}.lora_A.weight", torch.full((3, 64), torch.nan)), "not finite", "fault", "1 of 8 tensors hold NaN"),
    (one(f"{Q0}.lora_B.weight", torch.full((64, 3), -torch.inf)), "not finite", "fault", "infinity"),
    (one(f"{Q0}.lora_B.weight", torch.full((64, 3), 70_000.0)), "fp16", "warning", "infinite in fp16"),
    (one(f"{Q0}.lora_B.weight", torch.full((64, 3), -30_000.0)), "fp16", "warning", "the scaling times B"),
    (one(f"{Q0}.lora_B.weight", torch.full((64, 3), 1e-9)), "fp16", "warning", "every value is zero in fp16"),
    (one(f"{Q0}.lora_B.weight", torch.ones(64, 3).bfloat16()), "dtype", "note", "bfloat16 (1)"),
    (one(f"{Q0}.lora_B.weight", torch.ones(64, 3, dtype=torch.int8)), "dtype", "fault", "int8"),
    (one(f"{Q0}.lora_B.weight", torch.zeros(0)), "empty", "fault", "one process of a sharded run"),
    (one(f"{Q0}.lora_B.weight", torch.ones(192)), "empty", "fault", "one process of a sharded run"),
    (lambda held: {}, "empty", "fault", "holds no tensor"),
    (one(f"{Q0}.lora_B.weight", torch.ones(64, 5)), "shapes", "fault", "[3, 64] and [64, 5] do not fit"),
    (without("layers.0.self_attn.q_proj.lora_B.weight"), "one factor", "fault", "lora_A without lora_B"),
    (without("layers.0.self_attn.q_proj.lora_A.weight"), "one factor", "fault", "lora_B without lora_A"),
    (renamed(DEPTH, DEPTH * 2), "names: doubled prefix", "fault", "8 of 8 tensors are called wrong"),
    (renamed(DEPTH, f"_orig_mod.{DEPTH}"), "names: torch.compile", "fault", "torch.compile"),
    (renamed(DEPTH, f"module.{DEPTH}"), "names: DataParallel", "fault", "DataParallel"),
    (renamed("layers.", "_fsdp_wrapped_module.layers."), "names: FSDP", "fault", "FSDP"),
    (renamed("lora_A.weight", "lora_A.default.weight"), "names: adapter name", "fault", "4 of 8 tensors"),
    (renamed(DEPTH, ""), "names: no prefix", "fault", "inner model's state"),
    (lambda held: {k: t for k, t in held.items() if "up_proj" not in k}, "targets", "warning", "names up_proj"),
    (renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"), "keys", "fault", "named by no entry"),
    (one(f"{DEPTH}model.norm.weight", torch.ones(64)), "keys nobody reads", "warning", "model.norm.weight"),
    (one(f"{Q0}.lora_magnitude_vector", torch.ones(64)), "keys nobody reads", "warning", "lora_magnitude_vector"),
    (one(f"{Q0}.lora_B.bias", torch.ones(64)), "keys nobody reads", "warning", "lora_B.bias"),
    (renamed("layers.1.", "layers.4."), "gaps", "warning", "blocks 1 to 3 have no adapter"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "check", "severity", "words"), TENSORS, ids=[f"{row[1]}-{row[3][:24]}" for row in TENSORS]
)
def test_tensors_that_are_wrong(healthy, how, check, severity, words):
    tensors(healthy, how)
    findings = [finding for finding in examine(healthy).findings if finding.check == check]
    assert [finding.severity for finding in findings] == [severity] * len(findings) and findings
    assert any(words in finding.said and finding.way for finding in findings), findings


@pytest.mark.parametrize(
    "how",
    [without("layers.0.self_attn.q_proj.lora_B.weight"), one("foo.bar", torch.ones(3))],
    ids=["one factor", "a stranger"],
)
def test_what_merge_cannot_read_is_not_sent_to_merge(healthy, how):
    tensors(healthy, how)
    findings = examine(healthy).findings
    assert any(finding.severity == "fault" for finding in findings)
    assert not [finding for finding in findings if "minilora merge" in finding.way]


CONFIGS = [
    ({"base_model_name_or_path": None}, "base", "warning", "is empty"),
    ({"base_model_name_or_path": "/home/ada/models/llama"}, "base", "warning", "on another machine"),
    ({"base_model_name_or_path": "D:\\models\\llama"}, "base", "warning", "on another machine"),
    ({"base_model_name_or_path": "./out/checkpoint-60"}, "base", "warning", "a checkpoint of a run"),
    ({"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}, "base", "note", "is packed"),
    ({"revision": None}, "revision", "note", "not pinned"),
    ({"lora_alpha": 999}, "scale", "warning", "scaled by 333"),
    ({"use_rslora": True}, "servers", "warning", "llama.cpp would scale model.layers.0.mlp.up_proj by 4 where 6.928"),
    ({"alpha_pattern": {"q_proj": 30}}, "servers", "warning", "vLLM would scale model.layers.0.self_attn.q_proj by 4 where 10"),
    ({"alpha_pattern": {"q_proj": 30}}, "servers", "warning", "llama.cpp would scale model.layers.0.self_attn.q_proj by 4"),
    ({"init_lora_weights": "pissa"}, "servers", "warning", "vLLM would read"),
    ({"r": 5}, "rank", "fault", "4 of 4 layers have another rank"),
    ({"rank_pattern": {"up_proj": 7}}, "rank", "fault", "2 of 4 layers have another rank"),
    ({"rank_pattern": {".*_proj": 3}}, "expressions", "warning", "regular expressions"),
    ({"r": 0}, "config", "fault", "r=0"),
    ({"r": []}, "config", "fault", "r=[]"),
    ({"lora_alpha": "16"}, "config", "fault", "lora_alpha='16'"),
    ({"peft_type": "LOHA"}, "method", "warning", "no LoRA"),
    ({"peft_type": ...}, "method", "fault", "no peft_type"),
    ({"future_rope": 3}, "unknown fields", "warning", "future_rope=3"),
    ({"future_rope": None}, "unknown fields", "note", "not set"),
    ({"use_qalora": True}, "PEFT alone", "warning", "use_qalora"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "PEFT alone", "warning", "layer_replication"),
    ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "targets", "warning", "names v_proj"),
    ({"modules_to_save": ["lm_head"]}, "copies", "fault", "names lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "check", "severity", "words"), CONFIGS, ids=[f"{row[1]}-{row[3][:24]}" for row in CONFIGS]
)
def test_configs_that_are_wrong(healthy, fields, check, severity, words):
    change(healthy, **fields)
    findings = [finding for finding in examine(healthy).findings if finding.check == check]
    assert findings and {finding.severity for finding in findings} == {severity}
    assert any(words in finding.said and finding.way for finding in findings), findings


AROUND = [
    ({"adapter_model.bin": b"\x80"}, "pickle", "warning", "was not read"),
    ({"optimizer.pt": b"", "rng_state_0.pth": b"", "scheduler.pt": b""}, "leftovers", "note", "states of a trainer"),
    ({"training_args.bin": b""}, "leftovers", "note", "arguments"),
    ({"global_step60/x": b"", "zero_to_fp32.py": b"", "latest": b""}, "leftovers", "note", "DeepSpeed"),
    ({"pytorch_model_fsdp_0/__0_0.distcp": b""}, "leftovers", "note", "FSDP"),
    ({"model-00001-of-00002.safetensors": b""}, "two models", "warning", "beside the adapter"),
]


@pytest.mark.parametrize(("around", "check", "severity", "words"), AROUND, ids=[row[3] for row in AROUND])
def test_what_lies_beside(healthy, around, check, severity, words):
    files(healthy, around)
    (finding,) = examine(healthy).findings
    assert (finding.check, finding.severity) == (check, severity) and words in finding.said


def test_a_probe_is_missed(healthy):
    (healthy / "probe.json").unlink()
    assert found(healthy) == {"probe": "note"}


# ---- what PEFT writes is healthy


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"trainable_token_indices": [1, 2]},
        {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"layers.0.mlp.up_proj": 7}},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.mlp.up_proj"]},
        {"use_rslora": True, "init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_no_fault_in_what_peft_writes(tmp_path, fields):
    """Only what servers make of it is said."""
    examined = examine(peft_folder(tmp_path / "a", **fields))
    assert {finding.check for finding in examined.findings} <= {"servers", "tables", "probe", "gaps"}
    assert examined.healthy, examined.findings
    read_adapter(tmp_path / "a")


def test_a_classifier_of_peft(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(LlamaForSequenceClassification(models.llama_config()), config)
    models.randomize(model).save_pretrained(tmp_path / "a")
    assert "copies" not in found(tmp_path / "a")
    tensors(tmp_path / "a", without("score.weight"))
    assert found(tmp_path / "a")["copies"] == "fault"


@pytest.mark.parametrize("name", ["norm", "layernorm"])
def test_half_a_name_of_modules_to_save(tmp_path, name):
    """PEFT takes every module whose path ends so."""
    assert not {"copies", "keys nobody reads"} & set(found(peft_folder(tmp_path / "a", modules_to_save=[name])))


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_CLS", "TOKEN_CLS", None])
def test_a_model_without_a_head_beside_its_base(tmp_path, base_folder, task):
    import transformers

    kinds = {
        "QUESTION_ANS": "ForQuestionAnswering",
        "SEQ_CLS": "ForSequenceClassification",
        "TOKEN_CLS": "ForTokenClassification",
    }
    kind = getattr(transformers, f"AutoModel{kinds.get(task, '')}")
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"], task_type=task)
    models.randomize(peft.get_peft_model(kind.from_pretrained(base_folder), config)).save_pretrained(tmp_path / "a")
    assert not {"paths", "copies of the base"} & set(found(tmp_path / "a", model=str(base_folder)))
    tensors(tmp_path / "a", renamed("self_attn", "attention"))
    assert found(tmp_path / "a", model=str(base_folder))["paths"] == "fault"


def test_layers_that_peft_copies_are_in_no_base(tmp_path, base_folder):
    place = peft_folder(tmp_path / "a", layer_replication=[[0, 2], [0, 2]])
    assert "paths" not in found(place, model=str(base_folder)) and found(place)["PEFT alone"] == "warning"


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_another_method_of_peft_is_called_so_and_nothing_else(tmp_path, base_folder, config):
    peft.get_peft_model(models.llama(), config).save_pretrained(tmp_path / "a")
    examined = examine(tmp_path / "a", str(base_folder))
    assert [finding.check for finding in examined.findings if finding.severity != "note"] == ["method"]
    assert examined.kind.startswith(config.peft_type.value)


def test_shared_projections_of_vera_are_in_no_base(tmp_path, base_folder):
    config = peft.VeraConfig(r=4, target_modules=["q_proj"])
    models.randomize(peft.get_peft_model(models.llama(), config)).save_pretrained(tmp_path / "a")
    assert set(found(tmp_path / "a", model=str(base_folder))) <= {"servers", "probe", "gaps", "base"}


def test_vera_is_called_so_and_no_scale_of_lora_is_said_of_it(tmp_path):
    config = peft.VeraConfig(r=4, target_modules=["q_proj"])
    models.randomize(peft.get_peft_model(models.llama(), config)).save_pretrained(tmp_path / "a")
    examined = examine(tmp_path / "a")
    assert examined.kind.startswith("VeRA") and examined.facts["rank"] == "4; scaling 1"
    said = [finding.said for finding in examined.findings if finding.check == "servers"]
    assert "vLLM finds no LoRA in the folder: its tensors are of vera" in said and "would scale" not in "".join(said)


def test_a_head_that_is_tied_and_saved_twice(healthy):
    table = torch.randn(64, 64)
    for name in ("lm_head", "model.embed_tokens"):
        tensors(healthy, one(f"{DEPTH}{name}.weight", table))
    change(healthy, modules_to_save=["lm_head", "embed_tokens"])
    assert found(healthy)["tied"] == "note"
    tensors(healthy, one(f"{DEPTH}lm_head.weight", torch.randn(64, 64)))
    assert "tied" not in found(healthy)


@pytest.mark.parametrize(
    ("r", "check", "severity", "words"),
    [
        (24, "rank of vLLM", "note", "--max-lora-rank 32"),
        (513, "servers", "warning", "513"),
        (16, "rank of vLLM", None, ""),
    ],
)
def test_ranks_of_vllm(healthy, r, check, severity, words):
    shapes = {"q_proj": (64, 64), "up_proj": (96, 64)}
    change(healthy, r=r)

    def resized(held):
        return {key: torch.ones(*((r, 64) if "lora_A" in key else (shapes[key.split(".")[-3]][0], r))) for key in held}

    tensors(healthy, resized)
    finding = next((f for f in examine(healthy).findings if f.check == check), None)
    assert (finding and finding.severity) == severity and (finding is None or words in finding.way)


# ---- with the base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("base") / "llama"
    models.llama().save_pretrained(place)
    files(place, {"chat_template.jinja": models.CHATML})
    return place


def test_one_layer_that_one_block_alone_lacks(tmp_path):
    """Told by its neighbours in the block, and by the base where it is known; what was meant is none."""
    lost, targets = "layers.3.self_attn.q_proj", ["q_proj", "k_proj", "up_proj"]
    models.llama(num_hidden_layers=5).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=12, target_modules=targets, base_model_name_or_path="no/where")
    save_adapter(models.randomize(inject(models.llama(num_hidden_layers=5), config)), tmp_path / "a")
    (tmp_path / "a" / "minilora.json").unlink()
    files(tmp_path / "a", PROBE)
    change(tmp_path / "a", revision="5f3a")
    assert not found(tmp_path / "a")
    kept = (tmp_path / "a" / WEIGHTS).read_bytes()

    def said(without, **more):
        files(tmp_path / "a", {WEIGHTS: kept})
        tensors(tmp_path / "a", lambda held: {key: t for key, t in held.items() if not any(w in key for w in without)})
        findings = examine(tmp_path / "a", **more).findings
        return {finding.check: (finding.severity, finding.said) for finding in findings}

    (check, (severity, text)), *rest = said([lost]).items()
    assert (
        (check, severity) == ("one layer", "warning") and text.startswith(f"model.{lost}: neither A nor B") and not rest
    )
    assert said([lost], model=str(tmp_path / "base"))["one layer"][0] == "fault"
    with pytest.raises(CheckpointError, match="q_proj"):
        load_adapter(models.llama(num_hidden_layers=5), tmp_path / "a")
    assert set(said(["layers.3.self_attn.q_proj", "layers.1.self_attn.q_proj"])) == {"gaps"}
    assert set(said(["layers.3.mlp.up_proj"])) == {"gaps"}  # alone in its module: some models have such blocks
    assert set(said([f"{lost}.lora_A"])) >= {"one factor"} and "one layer" not in said([f"{lost}.lora_A"])
    for fields in ({"exclude_modules": [f"model.{lost}"]}, {"layers_to_transform": [0, 1, 2, 3, 4]}):
        change(tmp_path / "a", **fields)
        assert "one layer" not in said([lost])
        change(tmp_path / "a", **dict.fromkeys(fields))


def test_a_base_that_fits(healthy, base_folder):
    examined = examine(healthy, str(base_folder))
    assert not examined.findings and str(base_folder) in examined.facts["base"]
    change(healthy, base_model_name_or_path=str(base_folder))
    assert found(healthy) == {"base": "note"}  # a folder of this machine


@pytest.mark.parametrize(
    ("how", "check", "words"),
    [
        (renamed("model.layers", "model.language_model.layers"), "paths", "4 of 4 layers are not in"),
        (renamed("layers.1", "layers.2"), "paths", "2 of 4 layers are not in"),
        (one(f"{Q0}.lora_A.weight", torch.ones(3, 96)), "shapes of the base", "64 x 96 in the file, 64 x 64 there"),
        (one(f"{Q0}.lora_B.weight", torch.ones(32, 3)), "shapes of the base", "1 of 4 layers do not fit"),
    ],
)
def test_another_base(healthy, base_folder, how, check, words):
    assert check not in found(healthy, model=str(base_folder))
    tensors(healthy, how)
    (finding,) = [f for f in examine(healthy, str(base_folder)).findings if f.check == check]
    assert finding.severity == "fault" and words in finding.said


def test_a_resized_vocabulary(healthy, base_folder):
    change(healthy, modules_to_save=["lm_head", "embed_tokens"])
    for name in ("lm_head", "model.embed_tokens"):
        tensors(healthy, one(f"{DEPTH}{name}.weight", torch.randn(64, 64)))
    assert "resized" not in found(healthy, model=str(base_folder))
    tensors(healthy, one(f"{DEPTH}model.embed_tokens.weight", torch.randn(67, 64)))
    assert found(healthy, model=str(base_folder))["resized"] == "warning"


def test_new_tokens_without_rows(healthy, base_folder):
    added = {"added_tokens_decoder": {"66": {"content": "<|new|>"}, "x": {}, "1": 3}}
    files(healthy, {"tokenizer_config.json": json.dumps(added)})
    assert found(healthy, model=str(base_folder))["new tokens"] == "fault"
    change(healthy, modules_to_save=["embed_tokens"])
    tensors(healthy, one(f"{DEPTH}model.embed_tokens.weight", torch.randn(67, 64)))
    assert "new tokens" not in found(healthy, model=str(base_folder))


def test_tokens_that_the_base_lacks(healthy, base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    files(base, {"added_tokens.json": json.dumps({"<s>": 0})})
    files(healthy, {"added_tokens.json": json.dumps({"<s>": 0})})
    assert "new tokens" not in found(healthy, model=str(base))
    files(healthy, {"added_tokens.json": json.dumps({"<s>": 0, "<think>": 9})})
    assert found(healthy, model=str(base))["new tokens"] == "warning"


def test_a_template_that_drifted(healthy, base_folder):
    files(healthy, {"chat_template.jinja": models.CHATML})
    assert "template" not in found(healthy, model=str(base_folder))
    trained = hashlib.sha256(models.CHATML.encode()).hexdigest()
    assert "template" not in found(healthy, template=trained)
    assert found(healthy, template="0" * 64)["template"] == "warning"
    files(healthy, {"chat_template.jinja": models.CHATML + " "})
    assert found(healthy, model=str(base_folder))["template"] == "warning"


def test_a_template_in_the_tokenizers_config(healthy, base_folder):
    files(healthy, {"tokenizer_config.json": json.dumps({"chat_template": "another"})})
    assert found(healthy, model=str(base_folder))["template"] == "warning"


def test_a_model_that_is_none(healthy, capsys, tmp_path):
    assert main(["doctor", str(healthy), "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- our own


@pytest.fixture
def ours(tmp_path):
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "up_proj"], base_model_name_or_path="no/where")
    save_adapter(models.randomize(inject(models.llama(), config)), tmp_path / "a")
    return tmp_path / "a"


def test_our_own_is_healthy(ours):
    assert found(ours) == {"probe": "note"} and examine(ours).kind.endswith("by minilora")


OURS = [
    {},
    {"use_dora": True},
    {"alora_invocation_tokens": [1]},
    {"variant": "vera"},
    {"variant": "lora_xs"},
    {"variant": "lora_fa"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "loftq"},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]},
    {"trainable_token_indices": [1, 2]},
    {"modules_to_save": ["lm_head"]},
    {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {".*0.*up_proj": 3}},
]


@pytest.mark.parametrize("fields", OURS, ids=str)
def test_no_fault_in_what_we_write(tmp_path, fields):
    own = {name: value for name, value in fields.items() if name != "variant"}
    config = LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], **own})
    variant = {"variant": fields["variant"]} if "variant" in fields else {}
    save_adapter(models.randomize(inject(models.llama(), config, **variant)), tmp_path / "a")
    findings = examine(tmp_path / "a").findings
    assert {finding.check for finding in findings} <= {"servers", "tables", "probe", "base"}, findings
    assert not [finding for finding in findings if finding.severity == "fault"]


@pytest.mark.filterwarnings("ignore:.*experts:UserWarning")
def test_experts(tmp_path):
    """Their factors lie in one tensor for all experts, of another rank than the config's."""
    model = inject(mixtures.mixture(), LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
    save_adapter(models.randomize(model), tmp_path / "a")
    examined = examine(tmp_path / "a")
    assert examined.healthy and "experts" not in examined.facts["rank"], examined.findings
    assert {finding.check for finding in examined.findings} <= {"servers", "probe", "base"}


def test_a_seal_of_other_files(ours):
    change(ours, lora_alpha=24)
    assert found(ours)["seal"] == "fault"
    (ours / "minilora.json").write_text("{}")
    assert found(ours)["seal"] == "fault"
    (ours / "minilora.json").unlink()
    assert "seal" not in found(ours)


# ---- of other programs


def test_unsloth(healthy):
    """Its config: a packed base, a mark in auto_mapping; the tokenizer lies beside."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True}
    change(healthy, base_model_name_or_path="unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit", auto_mapping=mapping)
    files(healthy, {"tokenizer_config.json": json.dumps({"chat_template": "x"}), "special_tokens_map.json": "{}"})
    examined = examine(healthy)
    (finding,) = examined.findings
    assert "unsloth" in examined.kind and finding.check == "base" and finding.severity == "note"
    assert "unsloth/SmolLM2-135M-Instruct," in finding.way


def test_axolotl(healthy, tmp_path):
    """Its output folder: the adapter, the base's config, the tokenizer, checkpoints with states; old ones hold pickles alone."""
    out = tmp_path / "out"
    shutil.copytree(healthy, out)
    checkpoint = shutil.copytree(healthy, out / "checkpoint-40")
    files(checkpoint, {"optimizer.pt": b"", "training_args.bin": b"", "trainer_state.json": "{}"})
    files(
        out, {"axolotl_config.yml": "", "config.json": "{}", "tokenizer.json": "{}", "README.md": "built with Axolotl"}
    )
    assert "axolotl" in examine(out).kind and not examine(out).findings
    assert found(checkpoint) == {"leftovers": "note"}
    (out / CONFIG).unlink()
    (out / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="one in each of checkpoint-40; name one of them"):
        examine(out)


def test_mlx(ours, tmp_path, capsys):
    export_folder(ours, tmp_path / "mlx", "mlx")
    examined = examine(tmp_path / "mlx")
    assert examined.kind == "adapter of mlx-lm" and found(tmp_path / "mlx") == {"layout": "note"}
    assert examined.facts["layers"] == "4" and examined.facts["rank"] == "3; scale 1.0"
    assert examine(tmp_path / "mlx" / "adapters.safetensors").kind == "adapter of mlx-lm"
    content = json.loads((tmp_path / "mlx" / CONFIG).read_text())
    content["lora_parameters"]["rank"] = 4
    (tmp_path / "mlx" / CONFIG).write_text(json.dumps(content))
    assert found(tmp_path / "mlx")["rank"] == "fault"
    (tmp_path / "mlx" / CONFIG).unlink()
    assert found(tmp_path / "mlx")["config"] == "fault"


def single(place, names, **values):
    """A file with two factors a layer, of rank 4."""
    held = {}
    for layer, down, up in names:
        held[f"{layer}{down}"], held[f"{layer}{up}"] = torch.randn(4, 10), torch.randn(6, 4)
    safetensors.torch.save_file(held | values, place)
    return place


@pytest.mark.parametrize(
    ("layer", "down", "up", "kind"),
    [
        ("unet.down_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight", "diffusers"),
        ("unet.down_blocks.0.attn1.to_q", ".lora.down.weight", ".lora.up.weight", "diffusers, as it was before PEFT"),
        ("unet.a.processor.to_q", "_lora.down.weight", "_lora.up.weight", "diffusers, as it was before PEFT"),
        ("lora_unet_down_blocks_0_to_q", ".lora_down.weight", ".lora_up.weight", "kohya's scripts"),
    ],
)
def test_single_files(tmp_path, layer, down, up, kind):
    file = single(tmp_path / "x.safetensors", [(layer, down, up), (f"{layer}2", down, up)])
    assert examine(file).kind == examine(tmp_path).kind == f"adapter of {kind}"
    assert found(file)["layout"] == "note" and examine(file).healthy
    zero, bad = torch.zeros(6, 4), torch.full((6, 4), torch.nan)
    assert found(single(file, [(layer, down, up)], **{f"{layer}{up}": zero}))["untrained"] == "fault"
    assert found(single(file, [(layer, down, up)], **{f"{layer}2{up}": bad}))["one factor"] == "fault"
    assert found(file)["not finite"] == "fault"


def test_a_diffusers_folder(tmp_path):
    single(
        tmp_path / "pytorch_lora_weights.safetensors",
        [("transformer.blocks.0.to_q", ".lora_A.weight", ".lora_B.weight")],
    )
    assert examine(tmp_path).kind == "adapter of diffusers"


def gguf_file(place, kind="adapter", **factors):
    """A LoRA for llama.cpp, written by the gguf package: rank 4, of one linear layer and of the table of tokens."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(place, "llama")
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    drawn = torch.Generator().manual_seed(0)
    shapes = {"blk.0.attn_q.weight.lora_a": (4, 10), "blk.0.attn_q.weight.lora_b": (6, 4)}
    shapes |= {"token_embd.weight.lora_a": (11, 4), "token_embd.weight.lora_b": (10, 4)}
    held = {name: torch.randn(shape, generator=drawn).half() for name, shape in shapes.items()} | factors
    for name, tensor in held.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def test_a_lora_for_llama_cpp(tmp_path):
    file = gguf_file(tmp_path / "x.gguf")
    examined = examine(file)
    assert examined.kind == examine(tmp_path).kind == "adapter of llama.cpp" and found(file) == {"layout": "note"}
    assert examined.facts["rank"] == "4; alpha 0.0" and "float16" in examined.facts["size"]
    up = "blk.0.attn_q.weight.lora_b"
    bad = {up: torch.full((6, 4), torch.nan).half(), "token_embd.weight.lora_b": torch.zeros(10, 4).half()}
    assert found(gguf_file(file, **bad))["not finite"] == "fault" and found(file)["untrained"] == "warning"
    assert found(gguf_file(file, **{up: torch.ones(6, 5).half()}))["shapes"] == "fault"
    with pytest.raises(CheckpointError, match="and no adapter"):
        examine(gguf_file(file, kind="model"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError):
        examine(file)


def test_weights_of_peft_under_another_name(healthy, tmp_path):
    shutil.copy(healthy / WEIGHTS, tmp_path / "mine.safetensors")
    assert found(tmp_path / "mine.safetensors")["config"] == "fault"


# ---- what is no adapter


def emptied(place, *kept):
    for path in place.iterdir():
        if path.name not in kept:
            path.unlink()


REFUSED = [
    (lambda place: shutil.rmtree(place), "no such folder or file"),
    (lambda place: emptied(place), "no adapter: wanted"),
    (lambda place: emptied(place, WEIGHTS), "alone says neither scale nor layers"),
    (lambda place: emptied(place, CONFIG), "the weights were not saved"),
    (lambda place: (emptied(place, CONFIG), files(place, {"adapter_model.bin": b"x"})), "can run code and is never read"),
    (lambda place: (emptied(place), files(place, {"global_step10/x": b""})), "DeepSpeed"),
    (lambda place: (emptied(place, CONFIG), files(place, {"zero_to_fp32.py": b""})), "DeepSpeed"),
    (lambda place: (emptied(place), files(place, {"pytorch_model_fsdp.bin": b""})), "FSDP"),
    (lambda place: (emptied(place), files(place, {"config.json": "{}", "model.safetensors": b""})), "a whole model"),
    (lambda place: (place / CONFIG).write_text("{"), "no JSON"),
    (lambda place: (place / CONFIG).write_text("[]"), "no JSON"),
    (lambda place: (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:-9]), "damaged safetensors"),
    (lambda place: (place / WEIGHTS).write_bytes(b""), "damaged safetensors"),
    (lambda place: ((place / CONFIG).unlink(), os.mkfifo(place / CONFIG)), "not a regular file"),
    (lambda place: ((place / WEIGHTS).unlink(), os.mkfifo(place / WEIGHTS)), "not a regular file"),
    (lambda place: ((place / CONFIG).unlink(), (place / CONFIG).mkdir()), CONFIG),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), REFUSED, ids=[row[1][:30] for row in REFUSED])
def test_what_cannot_be_examined_is_one_line(healthy, capsys, damage, words):
    damage(healthy)
    assert main(["doctor", str(healthy)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err


@pytest.mark.parametrize("name", ["a.bin", "a.ckpt", "a.txt"])
def test_other_files_are_one_line(tmp_path, name):
    files(tmp_path, {name: b"\x80\x04"})
    with pytest.raises(CheckpointError, match="pickle" if name != "a.txt" else "no adapter"):
        examine(tmp_path / name)


# ---- the command


def test_codes_and_order(healthy, capsys):
    assert main(["doctor", str(healthy)]) == 0
    assert capsys.readouterr().out.endswith("\n\nno faults, no warnings, no notes\n")
    tensors(healthy, put(lora_B__weight=0.0))
    change(healthy, revision=None, use_rslora=True)
    assert main(["doctor", str(healthy)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("fault:", "warning:", "note:"))]
    assert [line.partition(":")[0] for line in lines] == ["fault", "warning", "note"]
    assert main(["doctor", str(healthy), "--json"]) == 1
    read = json.loads(capsys.readouterr().out)
    assert read["counts"] == {"fault": 1, "warning": 1, "note": 1} and read["findings"][0]["check"] == "untrained"
    assert read == json.loads(json.dumps(examine(healthy).as_json()))


def test_names_in_a_file_do_not_steer_the_terminal(healthy, capsys):
    change(
        healthy, base_model_name_or_path="/x\x1b[31m\n", modules_to_save=["\u202e"], target_modules=["q_proj", "\x07"]
    )
    main(["doctor", str(healthy)])
    assert not set("\x1b\x07\u202e") & set(capsys.readouterr().out)


# ---- promises


@pytest.mark.parametrize(
    "field", ["modules_to_save", "target_parameters", "exclude_modules", "target_modules", "layers_pattern"]
)
def test_a_list_of_half_a_million_names_is_looked_at_soon(healthy, field):
    change(healthy, **{field: [f"x{number}" for number in range(500_000)]})
    before = time.process_time()
    assert not examine(healthy).healthy
    assert time.process_time() - before < 10


def test_a_name_of_a_million_dots_is_looked_at_soon(healthy):
    tensors(healthy, one(f"{DEPTH}{'a.' * 1_000_000}lora_A.weight", torch.ones(3, 4)))
    before = time.process_time()
    assert found(healthy)["names: too long"] == "fault"
    assert time.process_time() - before < 10


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_what_has_neither_fault_nor_warning_loads(healthy):
    """On every folder of this file: what the reader refuses, the doctor has named before."""
    cases = [lambda how=row[0]: tensors(healthy, how) for row in TENSORS]
    cases += [lambda fields=row[0]: change(healthy, **fields) for row in CONFIGS]
    kept = {name: (healthy / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    silent = 0
    for case in cases:
        case()
        counts = examine(healthy).counts
        if not counts["fault"] and not counts["warning"]:
            silent += 1
            load_adapter(models.llama(), healthy)
        files(healthy, kept)
    assert silent >= 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # of fields that mean nothing: the reader says them
def test_a_mutated_folder_is_examined_or_refused(healthy):
    """As the other readers under tests/fuzz: whatever lies there, findings or one typed error."""
    import random

    from tests.fuzz import fuzz

    draw, kept = random.Random(7), {name: (healthy / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    outcomes, longest = {"examined": 0, "refused": 0}, 0
    for _ in range(400):
        if draw.random() < 0.5:
            files(healthy, {CONFIG: fuzz.mutate_json(draw, kept[CONFIG], [*json.loads(kept[CONFIG]), "x"])})
        else:
            files(healthy, {WEIGHTS: fuzz.mutate_header(draw, kept[WEIGHTS])})
        try:
            examined = examine(healthy)
            json.dumps(examined.as_json())
            outcomes["examined"] += 1
            if not examined.counts["fault"] and not examined.counts["warning"]:
                read_adapter(healthy)
        except CheckpointError as error:
            outcomes["refused"] += 1
            said = str(error)
            longest = max(longest, len(said) if said.isprintable() else 10_000)
        files(healthy, kept)
    assert 0 < longest < fuzz.LONGEST
    assert min(outcomes.values()) > 50, outcomes
