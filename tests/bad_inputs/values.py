"""Rows about settings: what no field of a config, no codebook and no registered name may be."""

import math

import torch

from minilora import (
    Adapter,
    Codebook,
    LoraConfig,
    QuantConfig,
    lora_plus_groups,
    prepare_model_for_kbit_training,
    register,
)
from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, DataError, QuantizationError, StateError
from minilora.hf import NF4Config
from minilora.hf.bench import BenchJob
from minilora.hf.plan import PlanJob
from minilora.job.finetune import Job
from minilora.lora.adapter import variant
from minilora.quant.codebooks import lloyd
from minilora.training.loop import TrainConfig

NAN, INF = math.nan, math.inf
JOB = {"model": "m", "data": "d.jsonl", "out": "o"}


# (class, what every row has, fields, what the message names, what it offers)
_FIELDS = [
    *((LoraConfig, {}, {"r": r}, "r=", "set r=8") for r in (0, -1, True, 4.0, "4", None, 2**40, NAN)),
    *((LoraConfig, {}, {"lora_alpha": a}, "lora_alpha=", "r or 2*r") for a in (0, -1, NAN, INF, "16", None, True, 1e40)),
    *((LoraConfig, {}, {"lora_dropout": p}, "lora_dropout=", "0.05") for p in (1.0, -0.1, NAN, 1.5, "0.1", None, True)),
    *((LoraConfig, {}, {"bias": b}, "bias=", "'lora_only'") for b in ("some", None, True, [])),
    *((LoraConfig, {}, {"task_type": t}, "task_type: Invalid task type: ", "CAUSAL_LM") for t in ("CAUSAL", 3, ["CAUSAL_LM"])),
    (LoraConfig, {}, {"use_rslora": "yes"}, "use_rslora='yes'", "True or False"),
    (LoraConfig, {}, {"use_dora": 1}, "use_dora=1", "True or False"),
    (LoraConfig, {}, {"lora_bias": None}, "lora_bias=None", "True or False"),
    (LoraConfig, {}, {"fan_in_fan_out": "auto"}, "fan_in_fan_out='auto'", "True or False"),
    (LoraConfig, {}, {"inference_mode": 0}, "inference_mode=0", "True or False"),
    (LoraConfig, {}, {"ensure_weight_tying": "no"}, "ensure_weight_tying='no'", "True or False"),
    (LoraConfig, {}, {"layer_replication": [[0, 4]]}, "layer_replication=", "build the deeper model first"),
    *(
        (LoraConfig, {}, {"init_lora_weights": init}, "init_lora_weights=", "'pissa_niter_N'")
        for init in ("xavier", None, 3, "pissa_niter_x", [], "", "pissa_niter_")
    ),
    (LoraConfig, {"use_dora": True}, {"init_lora_weights": "pissa"}, "use_dora", "drop one"),
    (LoraConfig, {"lora_bias": True}, {"use_dora": True}, "lora_bias", "drop one"),
    *(
        (LoraConfig, {}, {"layers_to_transform": at}, "layers_to_transform=", "such as [0, 1]")
        for at in (-1, "0", [], [0, -1], [True], 1.5, {"0": 1})
    ),
    (LoraConfig, {}, {"layers_pattern": "h"}, "layers_pattern='h'", "must also be specified"),
    (LoraConfig, {"layers_to_transform": 0}, {"layers_pattern": 3}, "layers_pattern=3", "a list of module names"),
    (LoraConfig, {"layers_to_transform": 0}, {"target_modules": ".*q"}, "layers_to_transform", "can name the layers itself"),
    *((LoraConfig, {}, {"target_modules": t}, "target_modules=", "a list of module names") for t in (5, [1], {"q": 1}, b"q", [None])),
    (LoraConfig, {}, {"exclude_modules": 3}, "exclude_modules=3", "a list of module names"),
    (LoraConfig, {}, {"modules_to_save": "head"}, "modules_to_save='head'", "write ['head']"),
    (LoraConfig, {}, {"modules_to_save": [None]}, "modules_to_save=[None]", "a list of module names"),
    (LoraConfig, {}, {"rank_pattern": {"q": 0}}, "rank_pattern['q']=0", "whole number >= 1"),
    (LoraConfig, {}, {"rank_pattern": {"q": True}}, "rank_pattern['q']=True", "whole number >= 1"),
    (LoraConfig, {}, {"rank_pattern": ["q"]}, "rank_pattern=['q']", "wanted a dict"),
    (LoraConfig, {}, {"rank_pattern": {1: 2}}, "rank_pattern={1: 2}", "wanted a dict"),
    (LoraConfig, {}, {"rank_pattern": {"(": 4}}, "rank_pattern key '('", "escape its special signs"),
    (LoraConfig, {}, {"alpha_pattern": {"q": 0}}, "alpha_pattern['q']=0", "a finite number > 0"),
    (LoraConfig, {}, {"alpha_pattern": {"q": NAN}}, "alpha_pattern['q']=nan", "a finite number > 0"),
    (LoraConfig, {}, {"alpha_pattern": {"[": 1}}, "alpha_pattern key '['", "escape its special signs"),
    (LoraConfig, {}, {"alpha_pattern": None}, "alpha_pattern=None", "wanted a dict"),
    (LoraConfig, {}, {"loftq_config": {"bits": 4}}, "loftq_config=", "'loftq_bits': 4"),
    (LoraConfig, {}, {"loftq_config": {"loftq_bits": 5}}, "loftq_bits=5", "wanted 2, 3 or 4"),
    (LoraConfig, {}, {"loftq_config": {"loftq_bits": [4]}}, "loftq_bits=[4]", "wanted 2, 3 or 4"),
    (LoraConfig, {}, {"loftq_config": {"loftq_iter": 0}}, "loftq_iter=0", "whole number >= 1"),
    (LoraConfig, {}, {"loftq_config": [4]}, "loftq_config=[4]", "wanted a dict"),
    *(
        (LoraConfig, {}, {"trainable_token_indices": ids}, "trainable_token_indices=", "a list of different token ids")
        for ids in ([], [1, 1], [-1], "ab", {"emb": []}, [True], 5, [2**70])
    ),
    (LoraConfig, {}, {"base_model_name_or_path": 5}, "base_model_name_or_path=5", "wanted text"),
    (LoraConfig, {}, {"revision": ["main"]}, "revision=['main']", "wanted text"),
    *((QuantConfig, {}, {"format": f}, "format=", "closest known ones") for f in ("nf5", 4, None, [], "NF4 ")),
    *((QuantConfig, {}, {"blocksize": b}, "blocksize=", "64 is usual") for b in (0, 48, 16, 8192, True, 64.0, "64", None)),
    (QuantConfig, {}, {"double_quant": 1}, "double_quant=1", "True or False"),
    (QuantConfig, {}, {"signed_scale": "no"}, "signed_scale='no'", "True or False"),
    *((QuantConfig, {}, {"scale": s}, "scale=", "'weighted'") for s in ("max", None, [])),
    (NF4Config, {}, {"format": "int5"}, "format='int5'", "closest known ones"),
    (NF4Config, {}, {"blocksize": 65}, "blocksize=65", "64 is usual"),
    (NF4Config, {}, {"skip_modules": "lm_head"}, "skip_modules='lm_head'", "write ['lm_head']"),
    (NF4Config, {}, {"skip_modules": [1]}, "skip_modules=[1]", "a list of module names"),
    (NF4Config, {}, {"scale": "weighted"}, "scale='weighted'", "minilora.calibrate"),
    *((TrainConfig, {}, {"steps": n}, "steps=", "whole number >= 1") for n in (0, 1.5, True, "60", None)),
    (TrainConfig, {}, {"batch_size": 0}, "batch_size=0", "whole number >= 1"),
    (TrainConfig, {}, {"accumulate": -1}, "accumulate=-1", "whole number >= 1"),
    *((TrainConfig, {}, {"lr": lr}, "lr=", "wanted a number in") for lr in (1, -1, NAN, "fast", None)),
    (TrainConfig, {}, {"lr": 0}, "lr=0", "1e-3 is usual"),
    (TrainConfig, {}, {"warmup": 1.5}, "warmup=1.5", "a whole number of them"),
    (TrainConfig, {}, {"warmup": 61}, "warmup=61", "give less, or shares"),
    (TrainConfig, {}, {"decay": 0.3}, "decay=0.3", "belongs to schedule='wsd'"),
    (TrainConfig, {}, {"epochs": 0}, "epochs=0", "a number > 0"),
    (TrainConfig, {}, {"epochs": 2, "steps": 3}, "steps=3 and epochs=2", "give one"),
    (TrainConfig, {}, {"schedule": "polynomial"}, "schedule='polynomial'", "wanted one of cosine"),
    (TrainConfig, {}, {"patience": 3}, "patience", "set eval_every"),
    (TrainConfig, {}, {"keep_best": True}, "keep_best", "set eval_every"),
    (TrainConfig, {}, {"min_delta": 0.1}, "min_delta=0.1", "set patience"),
    (TrainConfig, {}, {"optimizer": "lion"}, "optimizer='lion'", "wanted one of adamw, adamw8, sgd, muon, lora_fa"),
    (TrainConfig, {"optimizer": "lora_fa"}, {"riemannian_reg": 0.1}, "riemannian_reg=0.1", "take another optimizer"),
    (TrainConfig, {"optimizer": "lora_fa"}, {"loraplus_lr_ratio": 4}, "loraplus_lr_ratio=4.0", "leave it at 1.0"),
    (TrainConfig, {}, {"loraplus_lr_ratio": 0}, "loraplus_lr_ratio=0", "wanted a number > 0"),
    (TrainConfig, {}, {"weight_decay": 1.0}, "weight_decay=1.0", "wanted a number in"),
    *((TrainConfig, {}, {"clip": c}, "clip=", "wanted a number in") for c in (-1, INF, NAN)),
    (TrainConfig, {}, {"seed": -1}, "seed=-1", "whole number >= 0"),
    (TrainConfig, {}, {"seed": 2**80}, "seed=", "whole number from 0 to"),
    (TrainConfig, {}, {"eval_every": -1}, "eval_every=-1", "whole number >= 0"),
    (TrainConfig, {}, {"save_every": 0.5}, "save_every=0.5", "whole number >= 0"),
    (TrainConfig, {}, {"keep_checkpoints": 0}, "keep_checkpoints=0", "whole number >= 1"),
    (TrainConfig, {}, {"max_skipped": 0}, "max_skipped=0", "whole number >= 1"),
    (TrainConfig, {}, {"gradient_checkpointing": "yes"}, "gradient_checkpointing='yes'", "True or False"),
    *((Job, JOB, {"quant": q}, "quant=", "wanted one of none") for q in ("int5", None, [])),
    *((Job, JOB, {"dtype": d}, "dtype=", "float32, bfloat16") for d in ("float8", torch.float32)),
    *((Job, JOB, {"device": d}, "device=", "auto, cpu, cuda, cuda:N") for d in ("gpu", "cuda:x", None, 0, torch.device("cpu"))),
    (Job, JOB, {"attention": None}, "attention=None", "wanted text"),
    (PlanJob, {"model": "m"}, {"device": "gpu"}, "device='gpu'", "auto, cpu, cuda, cuda:N"),
    *((Job, JOB, {"max_length": n}, "max_length=", "whole number >= 2") for n in (1, True, 64.0, "64")),
    (Job, JOB, {"max_new_tokens": 0}, "max_new_tokens=0", "whole number >= "),
    *((Job, JOB, {"eval_share": s}, "eval_share=", "wanted a number in") for s in (1, -0.1, NAN, "half", None)),
    (Job, JOB, {"prompts": "How?"}, "prompts='How?'", "write ['How?']"),
    (Job, JOB, {"prompts": [1]}, "prompts=[1]", "a list of texts"),
    (Job, JOB, {"double_quant": "yes"}, "double_quant='yes'", "True or False"),
    (Job, JOB, {"resume": 1}, "resume=1", "True or False"),
    (Job, JOB, {"overwrite": "y"}, "overwrite='y'", "True or False"),
    (Job, JOB, {"model": ""}, "model=''", "wanted text"),
    (Job, JOB, {"data": None}, "data=None", "wanted text"),
    (Job, JOB, {"out": 3}, "out=3", "wanted text"),
    (Job, JOB, {"lora": {"r": 8}}, "lora=", "wanted a LoraConfig"),
    (Job, JOB, {"training": None}, "training=None", "wanted a TrainConfig"),
    *((PlanJob, {"model": "m"}, {"batch": b}, "batch=", "whole number >= 1") for b in (0, "4", 1.5, True)),
    (PlanJob, {"model": "m"}, {"seq": 1}, "seq=1", "whole number >= 2"),
    (PlanJob, {"model": "m"}, {"threads": -1}, "threads=-1", "whole number >= 0"),
    (PlanJob, {"model": "m"}, {"quant": "nf5"}, "quant='nf5'", "wanted one of none"),
    (PlanJob, {"model": "m"}, {"dtype": "half"}, "dtype='half'", "float32, bfloat16"),
    (PlanJob, {"model": "m"}, {"r": 0}, "r=0", "set r=8"),
    (PlanJob, {"model": "m"}, {"gradient_checkpointing": 1}, "gradient_checkpointing=1", "True or False"),
    (BenchJob, {"model": "m"}, {"steps": 0}, "steps=0", "whole number >= 1"),
    (BenchJob, {"model": "m"}, {"repeats": "2"}, "repeats='2'", "whole number >= 1"),
    (BenchJob, {"model": "m"}, {"seed": -1}, "seed=-1", "whole number >= 0"),
    *((BenchJob, {"model": "m"}, {"lr": lr}, "lr=", "wanted a number in") for lr in (0, NAN, "x")),
    (BenchJob, {"model": "m"}, {"lora_dropout": 0.1}, "lora_dropout", "leave it at 0"),
]  # fmt: skip

PEFT = {"peft_type": "LORA", "r": 8}
# (keys of an adapter_config.json, what the message names, what it offers)
_KEYS = [
    ({"peft_type": "IA3"}, "peft_type='IA3'", "'LORA' and 'VERA' adapters only"),
    ({"lora_aplha": 16}, "'lora_aplha'", "'lora_alpha'"),
    ({"use_qalora": True}, "use_qalora=True", "leave it at"),
    ({"target_parameters": "experts"}, "target_parameters='experts'", "write ['experts']"),
    ({"velora_config": {"rho": 2}}, "velora_config=", "leave it at"),
    ({"r": "8"}, "r='8'", "set r=8"),
    ({"lora_alpha": [16]}, "lora_alpha=[16]", "r or 2*r"),
    ({"lora_dropout": "no"}, "lora_dropout='no'", "0.05"),
    ({"target_modules": [{"q": 1}]}, "target_modules=", "a list of module names"),
]


def _register_twice(w):
    register("lora")(type("Mine", (Adapter,), {}))


OTHER = [
    ("codebook of 5 levels", lambda w: Codebook("five", (0.0,) * 5, ""), QuantizationError, "'five' has 5 levels", "4, 8, 16 or 256"),
    ("codebook above 1", lambda w: Codebook("far", (0.0, 1.0, 2.0, -1.0), ""), QuantizationError, "'far'", "divide them"),
    ("codebook with nan", lambda w: Codebook("nan", (0.0, 1.0, NAN, -1.0), ""), QuantizationError, "'nan'", "divide them"),
    ("lloyd without a block", lambda w: lloyd(torch.randn(5)), QuantizationError, "5 weights", "a smaller blocksize"),
    ("name taken", _register_twice, ConfigError, "'lora' is taken", "another name"),
    ("variant unknown", lambda w: variant("doar"), ConfigError, "'doar'", "'dora'"),
    ("LoRA+ ratio 0", lambda w: lora_plus_groups(w.adapted, 1e-3, 0), ConfigError, "ratio=0", "ratio=16"),
    ("LoRA+ rate nan", lambda w: lora_plus_groups(w.adapted, NAN), ConfigError, "lr=nan", "wanted a number > 0"),
    ("LoRA+ rate inf", lambda w: lora_plus_groups(w.adapted, INF), ConfigError, "lr=inf", "wanted a number > 0"),
    ("LoRA+ trains nothing", lambda w: lora_plus_groups(w.frozen(), 1e-3), StateError, "no parameter", "inject an adapter"),
    ("kbit upcast", lambda w: prepare_model_for_kbit_training(w.plain, upcast="some"), ConfigError, "upcast='some'", "'none'"),
    ("kbit with adapters", lambda w: prepare_model_for_kbit_training(w.adapted), StateError, "has adapters", "before get_peft_model"),
    ("kbit checkpoints", lambda w: prepare_model_for_kbit_training(w.plain), StateError, "MLP", "use_gradient_checkpointing=False"),
    ("labels for tokens", lambda w: Encoded((1, 2), (1,)), DataError, "2 tokens and 1 labels", "one label a token"),
]  # fmt: skip


def _made(cls, fields):
    return lambda w: cls(**fields)


ROWS = [
    *((f"{cls.__name__} {bad}", _made(cls, {**good, **bad}), ConfigError, thing, way) for cls, good, bad, thing, way in _FIELDS),
    *(
        (f"from_dict {keys}", lambda w, keys=keys: LoraConfig.from_dict({**PEFT, **keys}), ConfigError, thing, way)
        for keys, thing, way in _KEYS
    ),
    *OTHER,
]  # fmt: skip
