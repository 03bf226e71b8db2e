"""Variants and extra fields as PEFT does them: the same start, gradients, steps, files and merged weights."""

import copy
import json
import re
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from safetensors.torch import load_file

import minilora

# PEFT reads the orientation of a layer from its config and says so when it has to correct the config.
CONV1D = "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
# PEFT asks transformers for the old name of this property, also where a test turns warnings into errors.
OLD_NAME = "`is_gradient_checkpointing` is deprecated"
# PEFT's check of shapes takes the bias of lora_bias for a broken factor.
BIAS_SHAPE = r"ignore:Adapter 'default'. \d+ LoRA tensor\(s\) have invalid shape. \S*lora_B\.bias"
SAVED_TABLE = "ignore:Setting `save_embedding_layers` to `True` as embedding layers found:UserWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in (CONV1D, BIAS_SHAPE, SAVED_TABLE)]

PREFIX = "base_model.model."
SOME, SOME_GPT2 = ["q_proj", "down_proj"], ["c_attn", "c_fc"]
BIASED = ["q_proj", "o_proj"]  # of the tiny Llama's layers these have a bias, without which PEFT cannot merge lora_bias
TOKENS = [3, 11, 40, 63]

# Untied unless the case says otherwise, so that no case meets the rules for tied weights by chance.
LLAMA = {
    "dora": {"target_modules": SOME, "use_dora": True},
    "dora all-linear": {"target_modules": "all-linear", "use_dora": True},
    "dora gaussian rslora": {
        "target_modules": SOME,
        "use_dora": True,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
    },
    "dora patterns": {
        "target_modules": SOME,
        "use_dora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5},
    },
    "dora and norm": {"target_modules": SOME, "use_dora": True, "modules_to_save": ["model.norm"]},
    "pissa": {"target_modules": SOME, "init_lora_weights": "pissa"},
    "pissa rslora": {"target_modules": SOME, "init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"target_modules": SOME, "init_lora_weights": "olora"},
    "olora rslora": {"target_modules": SOME, "init_lora_weights": "olora", "use_rslora": True},
    "orthogonal": {"target_modules": SOME, "init_lora_weights": "orthogonal"},
    "orthogonal all-linear": {"target_modules": "all-linear", "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": SOME, "init_lora_weights": "mica"},
    "mica embedding rslora": {
        "target_modules": ["embed_tokens", "v_proj"],
        "init_lora_weights": "mica",
        "use_rslora": True,
    },
    "lora_bias": {"target_modules": BIASED, "lora_bias": True},
    "rslora all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding and linear": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding rslora pattern": {
        "target_modules": ["embed_tokens", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"embed_tokens": 6},
    },
    "tokens": {"target_modules": SOME, "trainable_token_indices": TOKENS},
    "tokens dict": {"target_modules": SOME, "trainable_token_indices": {"embed_tokens": TOKENS}},
    "tokens tied": {"target_modules": SOME, "trainable_token_indices": TOKENS, "tied": True},
    "tokens dict tied": {"target_modules": SOME, "trainable_token_indices": {"embed_tokens": TOKENS}, "tied": True},
    "one layer": {"target_modules": SOME, "layers_to_transform": 1},
    "list of layers": {"target_modules": SOME, "layers_to_transform": [0]},
    "layers_pattern": {"target_modules": SOME, "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_pattern list": {"target_modules": SOME, "layers_to_transform": [1], "layers_pattern": ["layers"]},
    "copy of the head": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "copies": {"target_modules": SOME, "modules_to_save": ["lm_head", "model.norm", "embed_tokens"]},
}
GPT2 = {
    "dora": {"target_modules": SOME_GPT2, "use_dora": True},
    "dora all-linear rslora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "pissa": {"target_modules": SOME_GPT2, "init_lora_weights": "pissa"},
    "orthogonal": {"target_modules": SOME_GPT2, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": SOME_GPT2, "init_lora_weights": "mica"},
    "lora_bias": {"target_modules": SOME_GPT2, "lora_bias": True},
    "embedding": {"target_modules": ["wte", "c_attn"]},
    "positions": {"target_modules": ["wpe", "c_attn"]},
    "tokens": {"target_modules": SOME_GPT2, "trainable_token_indices": TOKENS},
    "tokens tied": {"target_modules": SOME_GPT2, "trainable_token_indices": {"wte": TOKENS}, "tied": True},
    "layers_pattern": {"target_modules": SOME_GPT2, "layers_to_transform": [1], "layers_pattern": "h"},
    "copy of a norm": {"target_modules": SOME_GPT2, "modules_to_save": ["ln_f", "wpe"]},
}
CASES = [
    pytest.param(family, fields, id=f"{family}-{name}")
    for family, table in (("llama", LLAMA), ("gpt2", GPT2))
    for name, fields in table.items()
]
every_case = pytest.mark.parametrize(("family", "fields"), CASES)


def select(*words, without=()):
    """The cases whose name has one of these words."""
    chosen = [c for c in CASES if any(word in c.id for word in words) and not any(word in c.id for word in without)]
    return pytest.mark.parametrize(("family", "fields"), chosen)


def wrap(library, model, fields, seed=11, **more):
    """``model`` with a new adapter; minilora and PEFT differ in nothing but the module whose names are called."""
    config = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **copy.deepcopy(fields), **more}
    config.pop("tied", None)
    torch.manual_seed(seed)
    return library.get_peft_model(model, library.LoraConfig(**config))


def file_name(name):
    """What an adapter file calls the parameter of this name."""
    name = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".default", "")
    name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    name = re.sub(r"(lora_[AB])$", r"\1.weight", name.replace(".lora_bias", ".lora_B.bias"))
    return PREFIX + re.sub(
        r"(\.token_adapter)?\.trainable_tokens_delta$", ".token_adapter.trainable_tokens_delta", name
    )


def trainable(model):
    """The parameters that train, under the names that an adapter file has for them."""
    return {file_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model, size=0.1):
    """Move every trainable parameter by noise that depends on its name in the file only: a trained adapter."""
    with torch.no_grad():
        for key, parameter in trainable(model).items():
            generator = torch.Generator().manual_seed(sum(map(ord, key)))
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def gradients(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    return {key: parameter.grad for key, parameter in trainable(model).items()}


def train(model, ids, steps=3):
    """Losses of AdamW steps on one batch; eps keeps gradients that are mere rounding from becoming whole steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1, eps=1e-4), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_tensors(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and theirs
    for key in theirs:
        told = {"msg": lambda text, key=key: f"{key}: {text}", **(tolerance or {"rtol": 0, "atol": 0})}
        torch.testing.assert_close(ours[key], theirs[key], **told)


def assert_same_logits(found, wanted, tolerance=1e-6):
    """Equal within 1e-6 of the largest logit."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


@pytest.fixture
def base(build_model):
    """``base(family, fields)``: the tiny model of a case, untied unless the case ties it."""

    def make(family, fields=None):
        return build_model(family, tied=bool((fields or {}).get("tied")))

    return make


@pytest.fixture
def pair(base):
    """``pair(family, fields)``: minilora's and PEFT's model over equal bases, both disturbed equally."""

    def make(family, fields, **more):
        return tuple(disturb(wrap(library, base(family, fields), fields, **more)) for library in (minilora, peft))

    return make


@pytest.fixture
def files(pair, tmp_path):
    """``files(family, fields)``: adapter folders written by minilora and by PEFT from equal adapters."""

    def make(family, fields):
        for name, model in zip(("ours", "theirs"), pair(family, fields), strict=True):
            model.save_pretrained(tmp_path / name)
        return tmp_path / "ours", tmp_path / "theirs"

    return make


# The start


@select("orthogonal", "lora_bias", "embedding", "positions", "layer", "rslora all", "cop")
def test_same_seed_gives_a_bit_equal_start(base, family, fields):
    ours, theirs = (trainable(wrap(library, base(family, fields), fields)) for library in (minilora, peft))
    assert_same_tensors(ours, theirs)


@select("dora", "pissa", "olora", "tokens")
def test_same_seed_gives_an_equal_start_where_the_base_goes_into_it(base, family, fields):
    """Norms, singular vectors and QR are taken of equal weights in another order of operations; all else is bit-equal."""
    ours, theirs = (trainable(wrap(library, base(family, fields), fields)) for library in (minilora, peft))
    computed = {
        key for key in ours if "magnitude" in key or fields.get("init_lora_weights", True) not in (True, "gaussian")
    }
    assert_same_tensors({key: ours[key] for key in theirs}, theirs, rtol=1e-5, atol=2e-6)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - computed)


def test_same_seed_gives_the_bias_of_lora_bias_too_when_everything_starts_random(base):
    fields = {"target_modules": BIASED, "lora_bias": True, "init_lora_weights": False}
    ours, theirs = (trainable(wrap(library, base("llama"), fields)) for library in (minilora, peft))
    assert_same_tensors(ours, theirs)


@every_case
def test_generator_stands_where_peft_leaves_it(base, family, fields):
    states = []
    for library in (minilora, peft):
        wrap(library, base(family, fields), fields)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@every_case
def test_fresh_model_gives_the_logits_of_peft_and_of_the_base(base, token_ids, family, fields):
    ours, theirs = (wrap(library, base(family, fields), fields) for library in (minilora, peft))
    if fields.get("init_lora_weights", True) is not False:
        assert_same_logits(logits(ours, token_ids), logits(base(family, fields), token_ids))
    assert_same_logits(logits(ours, token_ids), logits(theirs, token_ids))


@select("dora", "pissa", "olora", "tokens", "embedding", without=("tied",))
def test_fresh_model_is_bit_equal_to_the_base(base, token_ids, family, fields):
    expected = logits(base(family, fields), token_ids)
    assert torch.equal(logits(wrap(minilora, base(family, fields), fields), token_ids), expected)


@every_case
def test_the_same_parameters_train_and_are_counted(base, family, fields):
    ours, theirs = (wrap(library, base(family, fields), fields) for library in (minilora, peft))
    assert trainable(ours).keys() == trainable(theirs).keys()
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0] > 0


# One step and three


@every_case
def test_logits_of_a_trained_adapter_are_equal(pair, base, token_ids, family, fields):
    ours, theirs = pair(family, fields)
    found = logits(ours, token_ids)
    assert_same_logits(found, logits(theirs, token_ids))
    assert (found - logits(base(family, fields), token_ids)).abs().max() > 1e-3


@every_case
def test_gradients_are_equal_after_one_backward(pair, token_ids, family, fields):
    found, wanted = (gradients(model, token_ids) for model in pair(family, fields))
    assert_same_tensors(found, wanted, rtol=1e-4, atol=2e-6)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@select("dora")
def test_gradients_of_the_first_step_are_equal_for_the_magnitudes(base, token_ids, family, fields):
    found, wanted = (gradients(wrap(library, base(family, fields), fields), token_ids) for library in (minilora, peft))
    keys = [key for key in found if key.endswith("lora_magnitude_vector")]
    assert keys and all(found[key].abs().max() > 1e-5 for key in keys)
    for key in keys:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=2e-6)


@every_case
def test_three_adamw_steps_give_equal_losses_and_weights(base, token_ids, family, fields):
    ours, theirs = (wrap(library, base(family, fields), fields) for library in (minilora, peft))
    before = {key: parameter.detach().clone() for key, parameter in trainable(ours).items()}
    found, wanted = train(ours, token_ids), train(theirs, token_ids)
    assert found == pytest.approx(wanted, rel=0, abs=5e-6) and found[-1] < found[0]
    assert_same_tensors(trainable(ours), trainable(theirs), rtol=0, atol=5e-6)
    assert all(not torch.equal(before[key], parameter) for key, parameter in trainable(ours).items())


# Files


@every_case
def test_file_of_peft_gives_the_same_logits_in_minilora(base, pair, token_ids, tmp_path, family, fields):
    _, theirs = pair(family, fields)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(11)  # pissa_niter_N draws its random projection again
    loaded = minilora.PeftModel.from_pretrained(base(family, fields), tmp_path)
    assert_same_logits(logits(loaded, token_ids), logits(theirs.eval(), token_ids))


@every_case
def test_file_of_minilora_gives_the_same_logits_in_peft_without_a_warning(
    base, pair, token_ids, tmp_path, family, fields
):
    ours, _ = pair(family, fields)
    ours.save_pretrained(tmp_path)
    model = base(family, fields)
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OLD_NAME, category=FutureWarning)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    assert_same_logits(logits(loaded, token_ids), logits(ours.eval(), token_ids))


@every_case
def test_tensor_files_have_equal_keys_shapes_dtypes_and_values(files, family, fields):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in files(family, fields))
    assert_same_tensors(
        ours,
        theirs,
        rtol=1e-5,
        atol=2e-6,
    )


def config_of(folder):
    """The saved config, with what PEFT keeps as sets (so in any order) as sets."""
    content = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(content[name], list):
            content[name] = set(content[name])
    return content


@every_case
def test_config_files_are_equal(files, family, fields):
    ours, theirs = map(config_of, files(family, fields))
    assert ours.keys() == theirs.keys()
    skip = {"target_modules"} if fields["target_modules"] == "all-linear" else set()
    differ = {key: (ours[key], theirs[key]) for key in ours.keys() - skip if ours[key] != theirs[key]}
    assert not differ


@every_case
def test_config_file_of_peft_is_unchanged_by_reading_and_writing(files, base, tmp_path, family, fields):
    _, theirs = files(family, fields)
    minilora.PeftModel.from_pretrained(base(family, fields), theirs).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(theirs)


@select("pissa", "olora", "tokens", "dora")
def test_loaded_adapter_continues_training_as_in_peft(files, base, token_ids, family, fields):
    _, folder = files(family, fields)
    losses = []
    for library in (minilora, peft):
        model = base(family, fields)
        torch.manual_seed(11)
        model = library.PeftModel.from_pretrained(model, folder, is_trainable=True)
        losses.append(train(model, token_ids))
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=5e-6)


# Merging


@every_case
def test_merged_weights_are_equal(pair, family, fields):
    ours, theirs = (model.merge_and_unload().state_dict() for model in pair(family, fields))
    # lora_bias gives a layer without a bias one; the others keep the key set of the base.
    assert_same_tensors(ours, theirs, rtol=0, atol=3e-6)


@every_case
def test_merged_model_computes_what_the_adapter_did(pair, token_ids, family, fields):
    ours, _ = pair(family, fields)
    expected = logits(ours, token_ids)
    assert_same_logits(logits(ours.merge_and_unload(), token_ids), expected, tolerance=5e-6)


@every_case
def test_unmerging_and_unloading_give_the_base_back_to_the_bit(pair, base, family, fields):
    ours, _ = pair(family, fields)
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert_same_tensors(ours.unload().state_dict(), base(family, fields).state_dict())


# ensure_weight_tying: in PEFT the head has parameters of its own over the embedding's memory, here it has none

TYING = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "tied": True}
TABLE = PREFIX + "model.embed_tokens.lora_embedding_"
HEAD = {
    PREFIX + "lm_head.lora_A.weight": TABLE + "B",
    PREFIX + "lm_head.lora_B.weight": TABLE + "A",
}  # the transpose of


@pytest.fixture
def tied_pair(base, tmp_path):
    """The two models with equal, trained adapters: PEFT's has read minilora's file."""
    ours = disturb(wrap(minilora, base("llama", TYING), TYING))
    ours.save_pretrained(tmp_path / "start")
    return ours, peft.PeftModel.from_pretrained(base("llama", TYING), tmp_path / "start", is_trainable=True)


def test_tied_adapter_starts_equal_but_for_the_projection_that_peft_draws_again_for_the_head(base):
    ours, theirs = (trainable(wrap(library, base("llama", TYING), TYING)) for library in (minilora, peft))
    assert theirs.keys() - ours.keys() == HEAD.keys()
    assert all(torch.equal(theirs[key].T, theirs[table]) for key, table in HEAD.items())
    assert_same_tensors(*({key: each[key] for key in ours.keys() - {TABLE + "B"}} for each in (ours, theirs)))
    assert ours[TABLE + "B"].detach().std().item() == pytest.approx(1, abs=0.15)  # as in an embedding that is not tied


def test_logits_of_a_tied_adapter_are_equal(tied_pair, base, token_ids):
    ours, theirs = (logits(model, token_ids) for model in tied_pair)
    assert_same_logits(ours, theirs)
    assert (ours - logits(base("llama", TYING), token_ids)).abs().max() > 1e-2


def test_gradients_of_a_tied_adapter_are_the_sums_of_those_that_peft_keeps_apart(tied_pair, token_ids):
    found, parts = (gradients(model, token_ids) for model in tied_pair)
    summed = {key: parts[key].clone() for key in found}
    for key in parts.keys() - found.keys():
        summed[HEAD[key]] += parts[key].T
    assert_same_tensors(found, summed, rtol=1e-4, atol=1e-5)


def test_steps_of_a_tied_adapter_are_equal_under_sgd(tied_pair, token_ids):
    """Under SGD two steps over one memory add up; under Adam they do not, and PEFT moves a tied adapter twice as far."""
    for model in tied_pair:
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=token_ids, labels=token_ids).loss.backward()
            optimizer.step()
    ours, theirs = map(trainable, tied_pair)
    assert_same_tensors(ours, {key: theirs[key] for key in ours}, rtol=1e-5, atol=1e-5)


def test_first_adam_step_moves_a_tied_adapter_twice_as_far_in_peft(base, token_ids):
    moved = []
    for library in (minilora, peft):
        model = wrap(library, base("llama", TYING), TYING)
        optimizer = torch.optim.Adam(
            [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3
        )
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        moved.append(trainable(model)[TABLE + "A"].abs().max().item())
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is lr in every coordinate
    if moved[1] < 1.5e-3:
        pytest.skip("this PEFT steps a tied adapter once")
    assert moved[1] == pytest.approx(2e-3, rel=1e-3)


def test_files_of_a_tied_adapter_are_equal(tied_pair, tmp_path):
    for name, model in zip(("ours", "theirs"), tied_pair, strict=True):
        model.save_pretrained(tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert_same_tensors(ours, theirs)
    assert any("lm_head.lora_A" in key for key in ours)


def test_file_of_peft_with_a_tied_adapter_gives_the_same_logits(base, token_ids, tmp_path):
    theirs = disturb(wrap(peft, base("llama", TYING), TYING))
    theirs.save_pretrained(tmp_path)
    loaded = minilora.PeftModel.from_pretrained(base("llama", TYING), tmp_path)
    assert_same_logits(logits(loaded, token_ids), logits(theirs.eval(), token_ids))


def test_merged_tied_adapter_computes_what_it_did_and_keeps_the_head_tied(tied_pair, token_ids):
    ours, _ = tied_pair
    expected = logits(ours, token_ids)
    merged = ours.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_same_logits(logits(merged, token_ids), expected)


def test_gpt2_shares_an_adapter_with_its_head_where_peft_does_not_know_the_name(base, token_ids):
    fields = {"target_modules": ["wte"], "ensure_weight_tying": True, "tied": True}
    with pytest.warns(UserWarning, match="no tied modules are added"):
        theirs = wrap(peft, base("gpt2", fields), fields)
    assert not any("lm_head" in key for key in trainable(theirs))
    model = disturb(wrap(minilora, base("gpt2", fields), fields))
    delta = model.transformer.wte.delta_weight()
    hidden = model.transformer(token_ids).last_hidden_state
    expected = hidden @ (base("gpt2", fields).lm_head.weight + delta).T
    assert_same_logits(logits(model, token_ids), expected.detach())
