"""A batch for any model: what its ``forward`` asks for by name, in the shapes that its config says.

Several are tried, the fullest first; the first one that the model takes, and that gives finite numbers, is the model's batch.
"""

import inspect
import itertools
import warnings

import torch
from torch.utils._pytree import tree_leaves

from tests.architectures.fields import BATCHES

ROWS, LENGTH = 2, 8
_TOKENS = (
    "image_token_id",
    "image_token_index",
    "audio_token_id",
    "audio_token_index",
    "video_token_id",
    "video_token_index",
)


def draw(*shape, seed=1):
    """Numbers of a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def configs(config):
    """The config and all that it holds, outermost first."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs(value)


def find(config, *names, default=None):
    """The first of these fields that the config has, or one inside it."""
    for part in configs(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, (dict, str)):
                return value
    return default


def number(value, default=0):
    """A size that may be a list."""
    return default if value is None else int(value[0] if isinstance(value, (list, tuple)) else value)


def outputs(model, batch, seed=0):
    """Call it; chance is the same each time."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return model(**batch)


def tensors(found):
    """The floating tensors of what a model returned, caches left out."""
    if hasattr(found, "items"):
        found = {name: value for name, value in found.items() if "past_key_values" not in name and "cache" not in name}
    return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def text_ids(config, length=LENGTH, rows=ROWS):
    """Random ids, none of which is special."""
    try:
        size = config.get_text_config().vocab_size
    except Exception:
        size = find(config, "vocab_size", default=64)
    size = number(size, 64)
    special = {
        v
        for part in configs(config)
        for k, v in vars(part).items()
        if k.endswith(("token_id", "token_index")) and isinstance(v, int)
    }
    allowed = torch.tensor([n for n in range(1, max(size - 1, 3)) if n not in special][:64] or [1])
    chosen = torch.randint(0, len(allowed), (rows, length), generator=torch.Generator().manual_seed(3))
    return allowed[chosen]


def images(config, names):
    """Several shapes of images: whole, patches with a grid, several for each row, a film."""
    vision = next(
        (part for part in list(configs(config))[::-1] if hasattr(part, "patch_size") and hasattr(part, "image_size")),
        config,
    )
    channels = number(find(vision, "num_channels", "in_channels", "in_chans", "num_image_channels"), 3) or 3
    side = find(vision, "image_size", "crop_size", "input_size", default=None) or find(config, "image_size", default=32)
    height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (number(side, 32),) * 2
    patch = number(find(vision, "patch_size", default=8), 8)
    found = []
    if "image_grid_thw" in names or "grid_thw" in names or "image_grid_hws" in names:
        parts = [part for part in configs(config) if hasattr(part, "patch_size")]
        part = parts[-1] if parts else config
        patch = number(getattr(part, "patch_size", 8), 8)
        channels = number(find(part, "in_channels", "in_chans", "num_channels"), 3)
        for temporal in dict.fromkeys((number(find(part, "temporal_patch_size"), 1), 1)):
            pixels = draw(ROWS * 16, channels * temporal * patch * patch)
            grid = torch.tensor([[1, 4, 4]] * ROWS)
            name = next(n for n in ("image_grid_thw", "grid_thw", "image_grid_hws") if n in names)
            found.append({"pixel_values": pixels, name: grid if name != "image_grid_hws" else grid[:, 1:]})
            found.append(
                {
                    "pixel_values": pixels.view(ROWS * 16, channels, patch, patch) if temporal == 1 else pixels,
                    name: grid,
                }
            )
    whole = draw(ROWS, channels, height, width)
    frames = number(find(config, "num_frames"), 4)
    sizes = {"image_sizes": torch.tensor([[height, width]] * ROWS)} if "image_sizes" in names else {}
    if "pixel_values_videos" in names and "pixel_values" not in names:
        return [{"pixel_values_videos": draw(ROWS, n, channels, height, width)} for n in (frames, 16)]
    found += [
        *([{"pixel_values": draw(ROWS, 2, channels, height, width), **sizes}] if sizes else []),
        {"pixel_values": whole, **sizes},
        *([{"pixel_values": whole}] if sizes else []),
        {"pixel_values": draw(ROWS, 1, channels, height, width), **sizes},
        {"pixel_values": draw(ROWS, frames, channels, height, width), **sizes},
        {"pixel_values": draw(ROWS, 2, channels, height, width), **sizes},
        {
            "pixel_values": draw(ROWS, channels, 64, 64),
            **({"image_sizes": torch.tensor([[64, 64]] * ROWS)} if sizes else {}),
        },
        {"pixel_values": draw(ROWS, channels, 224, 224)},
    ]
    if "aspect_ratio_ids" in names:
        found.insert(0, {
            "pixel_values": draw(ROWS, 1, number(find(config, "max_num_tiles"), 1), channels, height, width),
            "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(ROWS, 1, number(find(config, "max_num_tiles"), 1), dtype=torch.long),
        })  # fmt: skip
    if "pixel_position_ids" in names or "image_position_ids" in names or "spatial_shapes" in names:
        flat = draw(ROWS, 16, channels * patch * patch)
        places = (
            torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
            .view(1, 16, 2)
            .repeat(ROWS, 1, 1)
        )
        extra = {n: places for n in ("pixel_position_ids", "image_position_ids") if n in names}
        if "spatial_shapes" in names:
            extra |= {
                "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
                "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
            }
        found.insert(0, {"pixel_values": flat, **extra})
    return found


def sounds(config, names):
    """Waves, or spectrograms either way round."""
    mels = number(
        find(
            config,
            "num_mel_bins",
            "n_mels",
            "input_feat_per_channel",
            "mel_dim",
            "feature_size",
            "input_dim",
            "num_mels",
        ),
        16,
    )
    found = []
    name = next((n for n in ("input_features", "audio_features", "spectrogram") if n in names), None)
    length = number(find(config, "max_source_positions"), 32)
    if name:
        for frames in dict.fromkeys((2 * length, 64, 100, 256, 3000)):
            for shape in ((ROWS, mels, frames), (ROWS, frames, mels)):
                values = {name: draw(*shape)}
                for mask in ("feature_attention_mask", "input_features_mask", "attention_mask"):
                    if mask in names and (mask != "attention_mask" or "input_ids" not in names):
                        values[mask] = torch.ones(ROWS, frames, dtype=torch.long)
                found.append(values)
                found.append({name: draw(*shape)})
    if "audio_mel" in names:
        found += [{"audio_mel": draw(ROWS, 64, mels), "audio_mel_mask": torch.zeros(ROWS, 64, dtype=torch.bool)}]
    if "input_values" in names:
        for shape in (
            (ROWS, 4000),
            (ROWS, 1, 4000),
            (ROWS, 128, 128),
            (ROWS, number(find(config, "max_length"), 64), mels),
            (ROWS, 12000),
            (ROWS, 64, mels),
        ):
            found.append({"input_values": draw(*shape)})
    return found


def texts(config, names):
    """Words, and what goes with them."""
    ids = text_ids(config)
    values = {"input_ids": ids}
    if "attention_mask" in names:
        values["attention_mask"] = torch.ones_like(ids)
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        if name in names:
            values[name] = ids if name.endswith("ids") else torch.ones_like(ids)
    if "bbox" in names:
        values["bbox"] = torch.tensor([1, 2, 3, 5]).expand(ROWS, LENGTH, 4).clone()
    found = [values, {"input_ids": ids}]
    if "image_attention_mask" in names:
        values["image_attention_mask"] = torch.ones(ROWS, LENGTH, 1, dtype=torch.long)
    for rows in (64, 16):
        found.append({"input_ids": text_ids(config, rows)})
    return found


def with_media(model, config, names, media, text):
    """Words with as many places for images or sounds as the model makes of them."""
    kind = "audio" if not any("pixel" in name for name in media) else "image"
    token = find(config, f"{kind}_token_id", f"{kind}_token_index")
    if token is None:
        yield {**text, **media}
        return
    count = None
    get = getattr(model, f"get_{kind}_features", None) or getattr(
        getattr(model, "model", None), f"get_{kind}_features", None
    )
    if get is not None:
        try:
            wanted = inspect.signature(get).parameters
            with torch.no_grad():
                made = get(**{name: value for name, value in media.items() if name in wanted})
            made = getattr(made, "pooler_output", made)
            made = made[0] if isinstance(made, tuple) and not isinstance(made[0], torch.Tensor) else made
            leaves = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
            count = sum(t.numel() // t.shape[-1] for t in leaves)
        except Exception:
            count = None
    counts = [count // ROWS] if count else [4, 16, 1, 17, 64, 5, 8]
    if "image_embeds_position_mask" in names:
        count = number(find(config, "latent_query_num"), 4)
        ids = torch.cat((torch.full((ROWS, count), 3), text["input_ids"]), 1)
        places = (torch.arange(ids.shape[1]) < count).long().expand(ROWS, -1)
        yield {**media, "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": places}
    for each in counts:
        ids = torch.cat((torch.full((ROWS, each), number(token)), text["input_ids"]), 1)
        values = {**text, **media, "input_ids": ids}
        if "attention_mask" in text:
            values["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in names:
            values["mm_token_type_ids"] = (ids == token).long() * (1 if kind == "image" else 3)
        if "token_type_ids" in names and "mm_token_type_ids" not in names:
            values["token_type_ids"] = (ids == token).long()
        yield values
        if "token_type_ids" in values:
            yield {k: v for k, v in values.items() if k != "token_type_ids"}


def candidates(model):
    """Batches that a model may take, without labels."""
    config, names = model.config, set(inspect.signature(model.forward).parameters)
    if config.model_type in BATCHES:
        yield BATCHES[config.model_type](config)
        return
    seen = images(config, names) if names & {"pixel_values", "pixel_values_videos"} else []
    heard = (
        sounds(config, names)
        if names & {"input_features", "input_values", "audio_features", "spectrogram", "audio_mel"}
        else []
    )
    media = seen + heard
    read = texts(config, names) if "input_ids" in names else []
    decoder = {}
    if "decoder_input_ids" in names:
        decoder = {"decoder_input_ids": text_ids(config, 6)}
    if read:
        for each in media:
            for values in with_media(model, config, names, each, read[0]):
                yield {**values, **decoder}
                if decoder:
                    yield values
    for each in media:
        yield {**each, **decoder}
        if decoder:
            yield each
    for each in read:
        yield {**each, **decoder}
        if decoder:
            yield each
    if "inputs_embeds" in names:
        for width in dict.fromkeys((number(find(config, "hidden_size", "d_model"), 64), 64)):
            yield {"inputs_embeds": draw(ROWS, LENGTH, width)}
    first = next(iter(inspect.signature(model.forward).parameters))
    if "grid_thw" in names and "pixel_values" not in names:
        for temporal in dict.fromkeys((number(find(config, "temporal_patch_size"), 1), 1)):
            size = (
                number(find(config, "in_channels", "in_chans", "num_channels"), 3)
                * temporal
                * number(find(config, "patch_size"), 8) ** 2
            )
            yield {first: draw(ROWS * 16, size), "grid_thw": torch.tensor([[1, 4, 4]] * ROWS)}
    if first in ("hidden_states", "x", "inputs", "past_values", "inputs_embeds", "embeddings"):
        yield {
            first: draw(
                ROWS, number(find(config, "context_length"), LENGTH), number(find(config, "num_input_channels"), 64)
            )
        }
        yield {first: draw(ROWS, LENGTH, number(find(config, "hidden_size"), 64))}
        yield {first: draw(ROWS, LENGTH)}


def labels(model, batch, found):
    """What the class takes as labels, by the shape of its logits; several are tried."""
    names = set(inspect.signature(model.forward).parameters)
    if "labels" in names:
        logits = getattr(found, "logits", None)
        kinds = number(find(model.config, "num_labels"), 2)
        for name in ("decoder_input_ids", "input_ids"):
            if name in batch:
                yield {"labels": batch[name].clone()}
        if isinstance(logits, torch.Tensor):
            if logits.dim() == 2:
                yield {"labels": torch.arange(ROWS) % max(1, min(kinds, logits.shape[-1]))}
            if logits.dim() == 3:
                yield {"labels": torch.ones(ROWS, 3, dtype=torch.long)}
                yield {"labels": torch.ones(logits.shape[:2], dtype=torch.long)}
            if logits.dim() == 4 and "pixel_values" in batch:
                yield {"labels": torch.ones(ROWS, *batch["pixel_values"].shape[-2:], dtype=torch.long)}
        boxes = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2]])}
        yield {"labels": [boxes, boxes]}
    if "start_positions" in names:
        yield {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}


def fits(model, batch):
    """What the model returns for it, or None; and why not."""
    try:
        with torch.no_grad():
            found = outputs(model, batch)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:150]
    made = tensors(found)
    if not made or not all(t.isfinite().all() for t in made if t.numel()):
        return None, "returns nothing finite"
    return found, ""


def batch_for(model):
    """The model's batch: keyword arguments of its ``forward``, labels too where a loss comes of them.

    Raises:
        ValueError: none of those tried is taken.
    """
    reasons = []
    for batch in itertools.islice(candidates(model), 100):
        found, why = fits(model, batch)
        if found is None:
            reasons.append(f"{why} [{', '.join(batch)}]")
            continue
        for target in labels(model, batch, found):
            both = {**batch, **target}
            with_loss, _ = fits(model, both)
            loss = getattr(with_loss, "loss", None)
            if isinstance(loss, torch.Tensor) and loss.isfinite().all():
                return both
        return batch
    raise ValueError(
        reasons[0] if reasons else f"its forward wants {list(inspect.signature(model.forward).parameters)[:4]}"
    )
