"""Why tests of PEFT do not pass on minilora: kind, reason, and what is found in the error, the failing line or the test's name."""

from __future__ import annotations

import re
from typing import Any

STRICTER, WORKS, SCOPE, INTERNAL, WORDS, OPEN = (
    "stricter by design",
    "works where PEFT raises",
    "out of scope",
    "internal to PEFT",
    "refused too, in other words",
    "not explained",
)
EXCLUDED = "excluded"  # not about LoRA alone
# Features that `docs/limits.md` says are refused by name.
OUT_OF_SCOPE = (
    "Arrow", "BD-LoRA", "VeLoRA", "KaSA", "MonteCLoRA", "QA-LoRA", "Megatron", "layer replication", "mixed models",
)  # fmt: skip
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        SCOPE,
        "weights of modules that are neither linear, experts nor routers",
        r"target_parameters entry 'lin0.weight'",
    ),
    (STRICTER, "a pickle is not written (`safe_serialization=False`)", r"would write a pickle"),
    (
        STRICTER,
        "the caller's config is never changed nor kept: the model has a copy",
        r'\["default"\] is config|"fc1" in config.target_modules',
    ),
    (
        STRICTER,
        "an adapter is not loaded onto another base than its own (these tests draw a new one)",
        r"another base model",
    ),
    (STRICTER, "a changed folder is refused: its seal is broken", r"is not the file that was saved|minilora.json"),
    (
        STRICTER,
        "a second `get_peft_model` on a model that has adapters",
        r"has adapters \[.*\] already|::TestGetPeftModel::",
    ),
    (
        STRICTER,
        "an entry that matches nothing is refused",
        r"entry .* matches nothing|matches no adapted layer|test_exclude_modules_not_used|invalid_target_\w+_warns",
    ),
    (STRICTER, "a layer that stands in two places is refused", r"are one shared layer"),
    (
        STRICTER,
        "tied weights are refused without `ensure_weight_tying` or `untie`",
        r"shares its weight with|alt_weight_tying_tied_model_target_modules",
    ),
    (
        STRICTER,
        "the gradients of parameters are not switched off while adapters are disabled",
        r"to require gradients",
    ),
    (
        STRICTER,
        "aLoRA raises where it cannot know the invocation; PEFT leaves it out of that call",
        r"does not know where its invocation",
    ),
    (STRICTER, "rows of a batch with different aLoRA adapters", r"an activated adapter \(aLoRA\) changes"),
    (STRICTER, "an unknown key of a config is refused", r"unknown key"),
    (
        STRICTER,
        "an update that reads its base weight does not stand on a merged one",
        r"reads the base weight, in which",
    ),
    (STRICTER, "a model without a known architecture has no default targets", r"has no default for model_type"),
    (
        WORKS,
        "a second adapter with biases, `generate` with positional arguments, `lora_bias` beside a start",
        r"DID NOT RAISE",
    ),
    (
        EXCLUDED,
        "another method",
        r"the config is a \w+Config|Config: minilora has LoRA|Error: VBLORA|test_unilora|test_mixed.*_(LoHa|LoKr|AdaLora)",
    ),
    (SCOPE, "mixed models", r"mixed=True"),
    (
        INTERNAL,
        "`model.forward` does not take `adapter_names`; the call of the model does",
        r"unexpected keyword argument 'adapter_names'",
    ),
    (
        INTERNAL,
        "factors of experts are `[experts, r, in]` and `[experts, out, r]` in the model",
        r"test_rank_pattern_for_moe",
    ),
    (STRICTER, "a weight that is computed (a parametrization) is refused", r"its weight is computed"),
    (
        INTERNAL,
        "functions and classes inside PEFT's tuners",
        r"MissingInMinilora|test_input_embeds_warning|has no attribute 'update_layer'",
    ),
    (INTERNAL, "a linear layer that `target_parameters` names is a `lora.Linear`", r"test_repr_lora_paramwrapper"),
    (INTERNAL, "`LoraConfig._register_custom_module`, experimental in PEFT", r"_register_custom_module"),
    (INTERNAL, "one layer is merged or loses its adapter alone", r"changes a whole model here, not one layer"),
    (INTERNAL, "parts that a test puts into a layer by hand", r"quantization_backend|irregular"),
    (
        STRICTER,
        "the base is never changed: PiSSA, OLoRA and CorDA leave it as it is, and these tests want it changed",
        r"conversion_same_output_after_loading",
    ),
    (
        STRICTER,
        "what is tied is what shares its weight, whatever `config.tie_word_embeddings` says",
        r"when_model_config_tie_false|fixes_tie_word_embeddings",
    ),
    (
        STRICTER,
        "a bias that the adapter does not train is not written into the base",
        r"\.bias (is|are) unexpected",
    ),
    (STRICTER, "token rows are not left out of what is converted to LoRA", r"which no plain LoRA can"),
    (
        STRICTER,
        "no biases beside an attention's update, which PEFT does not merge",
        r"is a MultiheadAttention, whose weights are read",
    ),
    (STRICTER, "hot swap to a larger rank than the first", r"start from the largest rank"),
    (STRICTER, "a value that cannot be meant is refused when the config is built", r"test_lora_with_bias_argument"),
    (STRICTER, "lists of a config are tuples", r"target_modules, set\)|layers_to_transform == \[0, 1, 2\]"),
    (STRICTER, "a config has another `peft_type` than LORA", r"peft_type='test'"),
    (WORKS, "Mamba's `out_proj` and `conv1d`, whose weights are read", r"mamba_modules"),
    (WORKS, "aLoRA in beam search", r"test_num_beams_error"),
    (WORKS, "an adapter whose name is a part of `lora_`, which PEFT warns may be lost in loading", r"naming_conflict"),
    (INTERNAL, "`model.model` is the model's own part of that name", r"has no attribute 'model'"),
    (
        INTERNAL,
        "a layer that lost its last adapter is the plain layer again",
        r"no attribute '(frozen_peft_weight_names|modules_to_save)'|'frozen_peft_weight_names'\]",
    ),
    (INTERNAL, "PEFT shows the bare `out_proj` of an attention, without its update", r"mha_exposes_attributes"),
    (
        INTERNAL,
        "a test puts another `state_dict` in the place of the model's; the adapter is saved from the model",
        r"missing_keys_warning|hotswap_missing_key",
    ),
    (INTERNAL, "scalings that are tensors after a hot swap was prepared", r"scalings_are_tensors"),
    (INTERNAL, "PEFT's own version in a file", r"test_peft_version"),
    (INTERNAL, "a layer's dictionary that was taken before shows what is now", r"assert \{'default'.*\} != \{"),
    (INTERNAL, "where DoRA's cache lies", r"test_dora_caching"),
    (INTERNAL, "one dictionary object for all tables that are tied", r"trainable_tokens_delta is "),
    (INTERNAL, "private methods of PEFT's model", r"_get_module_names_tied_with_embedding|_restore_weights"),
    (INTERNAL, "PEFT's layers and variants built by hand", r"__init__\(\) got an unexpected keyword argument"),
    (INTERNAL, "PEFT shortens a long list of targets in its copy of the config", r"applies_find_target_modules"),
    (INTERNAL, "`base_model.model` is the model itself, with its adapters", r"test_model_with_injected_layers"),
    (INTERNAL, "a layer class built on PEFT's `LoraLayer`", r"consistent method resolution"),
    (INTERNAL, "VeRA's random matrices as `vera_A` and `vera_B` of model and layer", r"no attribute 'vera_[AB]'"),
    (INTERNAL, "an older spelling of LoRA-FA's groups", r"scaling_factor_deprecation"),
    (
        WORDS,
        "",
        r"Regex pattern did not match|target_parameters_wrong_type|not found in the base model|and in trainable_token_indices",
    ),
)


def reason(test: dict[str, Any]) -> tuple[str, str]:
    """``(kind, reason)`` of a test that fails on minilora and passes on PEFT."""
    for feature in test["features"]:
        if feature in OUT_OF_SCOPE:
            return SCOPE, feature
    text = f"{test.get('error', '')}\n{test.get('line', '')}\n{test['id']}"
    return next(
        ((kind, why) for kind, why, found in REASONS if re.search(found, text)),
        (OPEN, test["id"].split("::")[-1].split("[")[0]),
    )
