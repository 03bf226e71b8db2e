"""Configs: what cannot be meant is refused by field and value, and PEFT's dictionary goes in and out unchanged."""

import copy
import dataclasses
import enum
import json

import pytest

from minilora import inject
from minilora.errors import ConfigError
from minilora.lora.config import LoraConfig
from minilora.lora.config_file import OUT_OF_SCOPE
from minilora.quant.config import QuantConfig

INF, NAN = float("inf"), float("nan")

BAD = [
    *[("r", value, ">= 1; set r=8") for value in (0, -1, 4.0, True, None, "4")],
    *[("lora_alpha", value, "finite number > 0; lora_alpha = r") for value in (0, -8, INF, NAN, "8", None, True)],
    *[("lora_dropout", value, "probability in [0, 1); 0.05") for value in (1.0, -0.1, NAN, 1.5, "0", None, True)],
    *[("bias", value, "one of 'none', 'all', 'lora_only'") for value in ("some", None, True)],
    *[("task_type", value, "Must be one of the following task types: SEQ_CLS, SEQ_2_SEQ_LM") for value in ("LM", 3)],
    *[
        ("init_lora_weights", value, "wanted True, False, 'pissa_niter_N' or one of")
        for value in ("bogus", "pissa_niter", None)
    ],
    *[("target_modules", value, "list of module names or one regex string") for value in (3, [1], ["a", None])],
    *[("exclude_modules", value, "list of module names or one regex string") for value in (3, [1])],
    ("modules_to_save", 3, "list of module names"),
    ("modules_to_save", "lm_head", "write ['lm_head']"),
    ("rank_pattern", ["q_proj"], "dict of module-name pattern to number"),
    ("rank_pattern", {3: 8}, "dict of module-name pattern to number"),
    ("rank_pattern", {"q_proj(": 8}, "'q_proj(' is not a regular expression"),
    *[("rank_pattern", {"q_proj": value}, "['q_proj']=") for value in (0, 2.0, "2", True, None)],
    ("alpha_pattern", None, "dict of module-name pattern to number"),
    ("alpha_pattern", {"*": 8}, "'*' is not a regular expression"),
    *[("alpha_pattern", {"q_proj": value}, "['q_proj']=") for value in (0, -1, INF, NAN, "2", True)],
]


@pytest.mark.parametrize(("field", "value", "way_out"), BAD, ids=lambda item: str(item)[:30])
def test_bad_value_names_field_value_and_way_out(field, value, way_out):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{field: value})
    message = str(caught.value)
    shown = next(iter(value.values())) if isinstance(value, dict) and way_out.startswith("[") else value
    assert message.startswith(field) and way_out in message
    assert repr(shown) in message or "regular expression" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1, "lora_alpha": 0.5},
        {"r": 4, "lora_alpha": 16, "lora_dropout": 0},
        {"lora_dropout": 0.999},
        {"bias": "lora_only", "task_type": "SEQ_CLS"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"rank_pattern": {r"layers\.(0|1)\..*": 2}, "alpha_pattern": {"q_proj": 0.5}},
        {"target_modules": r".*\.q_proj"},
    ],
    ids=str,
)
def test_good_values_are_kept(fields):
    config = LoraConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_a_config_can_be_changed_until_it_is_used():
    config = LoraConfig(rank_pattern={"a": 2})
    assert config.for_module("x.a")[0] == 2
    config.r, config.rank_pattern = 4, {"b": 3}
    assert config.for_module("x.a")[0] == 4 and config.for_module("x.b")[0] == 3
    own = config.for_use()
    with pytest.raises(ConfigError, match="r=8: a model has adapters of this config already"):
        own.r = 8
    own.inference_mode = True
    config.r = 16
    assert own.r == 4 and own.inference_mode and not config.inference_mode


def test_what_was_set_is_checked_when_it_is_used():
    config = LoraConfig()
    config.r = -1
    with pytest.raises(ConfigError, match="r=-1: wanted"):
        config.for_use()
    with pytest.raises(ConfigError, match="no field 'lora_alhpa'; the closest are 'lora_alpha'"):
        config.lora_alhpa = 3


def test_fields_of_peft_are_taken_at_their_defaults():
    config = LoraConfig(r=3, target_parameters=None, use_bdlora=None, megatron_core="megatron.core", peft_type="LORA")
    assert config.r == 3 and config.target_parameters is None and config.peft_type == "LORA"
    with pytest.raises(ConfigError, match="use_bdlora="):
        LoraConfig(use_bdlora=True)
    with pytest.raises(TypeError, match="nonsense"):
        LoraConfig(nonsense=1)


@pytest.mark.parametrize(
    "names", [["v", "q", "v"], ("q", "v"), {"v", "q"}, frozenset("qv")], ids=lambda names: type(names).__name__
)
def test_names_become_a_sorted_tuple(names):
    assert LoraConfig(target_modules=names).target_modules == ("q", "v")


def test_the_users_own_dict_and_list_are_copied():
    pattern, names = {"q_proj": 2}, ["q_proj"]
    config = LoraConfig(rank_pattern=pattern, target_modules=names)
    pattern["v_proj"] = 0
    names.append("v_proj")
    assert config.rank_pattern == {"q_proj": 2} and config.target_modules == ("q_proj",)


def test_task_type_may_be_an_enum_as_in_peft():
    kind = enum.Enum("TaskType", {"CAUSAL_LM": "CAUSAL_LM"})
    assert LoraConfig(task_type=kind.CAUSAL_LM).task_type == "CAUSAL_LM"


Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
SHORT, LONG = "q_proj", "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ({SHORT: 2, LONG: 16}, [2, 2]),
        ({LONG: 16, SHORT: 2}, [2, 16]),
        ({"proj": 2}, [4, 4]),  # whole components only
        ({".*proj": 2}, [2, 2]),
        ({"q_proj$": 2}, [2, 2]),
        ({"self_attn": 2}, [4, 4]),  # the end of the path only
        ({r"layers\.[1-9]\..*": 2}, [4, 2]),
        ({"model.layers.0.self_attn.q_proj": 2}, [2, 4]),
        ({}, [4, 4]),
    ],
)
def test_first_pattern_that_matches_the_end_wins(pattern, want):
    ranks = LoraConfig(r=4, lora_alpha=32, rank_pattern=pattern)
    alphas = LoraConfig(r=32, lora_alpha=4, alpha_pattern=pattern)
    assert [ranks.for_module(path) for path in (Q0, Q1)] == [(rank, 32) for rank in want]
    assert [alphas.for_module(path) for path in (Q0, Q1)] == [(32, alpha) for alpha in want]


FULL = LoraConfig(
    r=4, lora_alpha=12, target_modules=["q_proj", "fc"], exclude_modules=r".*\.0\..*", lora_dropout=0.25,
    bias="lora_only", use_rslora=True, modules_to_save=["lm_head"], init_lora_weights="gaussian",
    rank_pattern={"q_proj": 2}, alpha_pattern={"fc": 0.5}, task_type="CAUSAL_LM", base_model_name_or_path="org/name", revision="main",
)  # fmt: skip


@pytest.mark.parametrize("config", [LoraConfig(), FULL], ids=["defaults", "every field"])
def test_round_trip_through_json(config):
    content = json.loads(json.dumps(config.to_dict()))
    assert LoraConfig.from_dict(content) == dataclasses.replace(config, inference_mode=True)


def test_dictionary_has_the_keys_of_peft_and_its_marks():
    content = FULL.to_dict()
    assert content["peft_type"] == "LORA" and content["inference_mode"] is True
    assert content["target_modules"] == ["fc", "q_proj"]
    assert content.keys() >= OUT_OF_SCOPE.keys()
    assert list(content) == sorted(content)


def test_dictionary_equals_that_of_peft():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"]).to_dict()
    ours = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"]).to_dict()
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours.items() if k not in ("target_modules", "inference_mode", "peft_version")} == {
        k: v for k, v in theirs.items() if k not in ("target_modules", "inference_mode", "peft_version")
    }


@pytest.mark.parametrize(("alpha", "written"), [(16.0, "16"), (16, "16"), (0.5, "0.5")])
def test_whole_alpha_is_written_as_an_integer(alpha, written):
    assert json.dumps(LoraConfig(lora_alpha=alpha).to_dict()["lora_alpha"]) == written


def test_changing_the_dictionary_changes_neither_config_nor_defaults():
    config, kept = LoraConfig(rank_pattern={"q_proj": 2}), copy.deepcopy(OUT_OF_SCOPE)
    for value in config.to_dict().values():
        if isinstance(value, dict):
            value["stray"] = 1
    try:
        assert config.rank_pattern == {"q_proj": 2}
        assert LoraConfig().loftq_config == {} and kept == OUT_OF_SCOPE
    finally:
        OUT_OF_SCOPE.update(kept)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; minilora reads 'LORA'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"r": 4, "lora_alhpa": 8}, "unknown key 'lora_alhpa'; the closest known ones are 'lora_alpha'"),
        ({"r": "4"}, "r='4': wanted a whole number"),
        ({"lora_alpha": NAN}, "lora_alpha=nan"),
        ({"use_qalora": True}, "use_qalora=True: a feature of PEFT that minilora does not offer; leave it at False"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": "a"}, "target_parameters='a': wanted a list of names"),
        ({"loftq_config": {"loftq_bits": 5}}, "loftq_bits=5; wanted 2, 3 or 4"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"megatron_core": "os"}, "megatron_core='os'"),
        ({"qalora_group_size": 8}, "qalora_group_size=8"),
    ],
    ids=str,
)
def test_foreign_dictionaries_are_refused_by_file_and_field(content, words):
    with pytest.raises(ConfigError, match=rf"^runs/a\.json: .*{words}"):
        LoraConfig.from_dict(content, "runs/a.json")


@pytest.mark.parametrize("name", sorted(OUT_OF_SCOPE))
def test_features_of_peft_are_accepted_at_their_default_only(name):
    LoraConfig.from_dict({"r": 4, name: OUT_OF_SCOPE[name]})
    LoraConfig.from_dict({"r": 4, name: []})  # PEFT writes target_parameters=[] for models whose experts are fused
    with pytest.raises(ConfigError, match=name):
        LoraConfig.from_dict({"r": 4, name: {"something": "else"}})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["first", "mid"]},
        {"target_modules": "all-linear", "bias": "all", "modules_to_save": ["last"]},
        {"target_modules": r"first|mid", "exclude_modules": ["first"], "rank_pattern": {"mid": 2}},
    ],
    ids=str,
)
def test_injecting_never_changes_the_config(make_mlp, fields):
    config = LoraConfig(r=4, lora_alpha=12, **fields)
    before = json.dumps(dataclasses.asdict(config))
    inject(make_mlp(), config)
    assert json.dumps(dataclasses.asdict(config)) == before


@pytest.mark.parametrize("size", [0, 16, 63, 96, 8192, 64.0, "64", True, None])
def test_blocksize_is_a_power_of_two_in_range(size):
    with pytest.raises(ConfigError, match=r"blocksize=.*power of two from 32 to 4096; 64 is usual"):
        QuantConfig(blocksize=size)


@pytest.mark.parametrize("size", [32, 64, 4096])
def test_usual_blocksizes_are_taken(size):
    assert QuantConfig(blocksize=size).blocksize == size


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_double_quant_is_a_bool(value):
    with pytest.raises(ConfigError, match=r"double_quant=.*wanted True or False"):
        QuantConfig(double_quant=value)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2**31},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e31},
        {"rank_pattern": {"q": 10**400}},
        {"alpha_pattern": {"q": 10**400}},
        {"rank_pattern": {"a{99999999999999999999}": 2}},
        {"alpha_pattern": {"(" * 5_000 + ")" * 5_000: 2}},
        {"task_type": "x" * 100_000},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_huge_is_refused_in_a_short_line(fields):
    """The fuzzer found these: numbers that no float holds, patterns that ``re`` gives up on, texts without end."""
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict(fields, "file")
    assert len(str(caught.value)) < 1_300 and "\n" not in str(caught.value) and str(caught.value).startswith("file: ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_bias": True, "use_dora": True}, "The argument lora_bias=True is for plain LoRA, not for dora"),
        (
            {"lora_bias": True, "init_lora_weights": "olora"},
            "The argument lora_bias=True is for plain LoRA, not for olora",
        ),
        (
            {"use_dora": True, "init_lora_weights": "pissa"},
            "use_dora goes with init_lora_weights True, False or 'gaussian', not 'pissa'",
        ),
        (
            {"layers_to_transform": 0, "target_modules": ".*q"},
            "`layers_to_transform` cannot be used when `target_modules` is a str",
        ),
        (
            {"layers_pattern": "h"},
            "`layers_to_transform` must also be specified; layers_pattern='h' does nothing alone",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]]: replicated layers share weights"),
        ({"use_rslora": 1}, "use_rslora=1: wanted True or False"),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together(fields, words):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)
    assert words in str(caught.value)


def test_fields_that_do():
    for fields in (
        {"use_dora": True, "init_lora_weights": "gaussian"},
        {"r": 4, "init_lora_weights": "orthogonal"},
        {"layers_to_transform": 0, "target_modules": "all-linear", "layers_pattern": ["h"]},
    ):
        LoraConfig(**fields)


def test_a_config_is_saved_and_read_alone(tmp_path):
    FULL.save_pretrained(tmp_path / "new")
    assert LoraConfig.from_pretrained(tmp_path / "new") == dataclasses.replace(FULL, inference_mode=True)
    (tmp_path / "new" / "adapter_config.json").write_text('{"r": 0, "peft_type": "LORA"}')
    with pytest.raises(ConfigError, match=r"new/adapter_config\.json: r=0"):
        LoraConfig.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize("value", ["max", None, True])
def test_the_scale_rule_is_one_of_three(value):
    with pytest.raises(ConfigError, match=r"scale=.*wanted one of 'absmax', 'mse', 'weighted'"):
        QuantConfig(scale=value)


@pytest.mark.parametrize(
    ("word", "variant"), [("OLoRA", "olora"), ("Gaussian", "lora"), ("PiSSA_niter_4", "pissa"), ("MiCA", "mica")]
)
def test_start_values_are_known_in_any_case(word, variant):
    config = LoraConfig(init_lora_weights=word)
    assert config.init_lora_weights == word.lower() and config.variant == variant
