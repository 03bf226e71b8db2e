"""What pipelines of diffusers load: one file, every name behind that of the part it belongs to. Next file: ``export/servers.py``.

diffusers takes alpha = r where a file says nothing of alpha, so the scaling that is in B is all there is. Its pipelines look for
``pytorch_lora_weights.safetensors`` in the folder.
"""

from __future__ import annotations

from torch import Tensor

from minilora.errors import ConfigError, StateError
from minilora.export.base import Base
from minilora.export.factors import Factors, Laid
from minilora.export.programs import COMPONENTS

__all__ = ["DIFFUSERS_FILE", "component_of", "for_diffusers"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # where diffusers looks for the rank in a text encoder


def component_of(base: Base) -> str:
    """Which part of a pipeline a model of this class is; "" for unknown."""
    name, library = base.model_class
    if library == "diffusers":
        return "unet" if "UNet" in name else "transformer" if "Transformer" in name else ""
    return "text_encoder" if library == "transformers" and name.startswith("CLIPTextModel") else ""


def for_diffusers(factors: Factors, base: Base, component: str | None = None) -> Laid:
    """The file, with the names of PEFT's layers behind the component's.

    Raises:
        ConfigError: an unknown component. StateError: it is not given and cannot be told, or diffusers passes over a layer of it.
    """
    if component is not None and component not in COMPONENTS:
        raise ConfigError(f"component={component!r}: wanted one of {', '.join(COMPONENTS)}")
    part = component or component_of(base)
    if not part:
        raise StateError(
            f"{base.model_class[0] or 'the adapter'}: which part of a pipeline it is cannot be told; give --component "
            f"{', '.join(COMPONENTS[:2])} or another (component=)"
        )
    if part.startswith("text_encoder"):
        _refuse_in_text(factors)
    tensors: dict[str, Tensor] = {}
    for path, factor in factors.items():
        A, B = factor.A, factor.B
        if factor.kernel:
            A, B = A.unflatten(1, (-1, *factor.kernel)), B.reshape(*B.shape, *[1] * len(factor.kernel))
        own = {"lora_A.weight": A, "lora_B.weight": B}
        if factor.magnitude is not None:
            own["lora_magnitude_vector"] = factor.magnitude
        tensors |= {f"{part}.{path}.{name}": tensor.contiguous() for name, tensor in own.items()}
    return Laid(DIFFUSERS_FILE, tensors, {"format": "pt"})


def _refuse_in_text(factors: Factors) -> None:
    for path, factor in factors.items():
        if not path.endswith(_TEXT):
            raise StateError(
                f"{path}: of a text encoder diffusers loads adapters of {', '.join(_TEXT)} only; merge instead"
            )
        if factor.magnitude is not None:
            raise StateError(f"{path}: of a text encoder diffusers passes over the magnitudes of DoRA; merge instead")
