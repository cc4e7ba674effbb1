"""Hugging Face names: configurations, known to AutoConfig by name, and models, registered with the Auto classes on import.

configuration   what every stitched configuration holds
config_fields   what a config.json may say, whoever wrote it
modeling_base   what every stitched model is
route           the one route walk
calibration     least squares for all stitching layers in one pass
similar         junctions by what fits
alignment       a short training of the stitching layers by the large anchor's output
references      how a bundle names its anchors and tells when one changed
tokenizers      anchors that belong together have one
processors      how image processors normalise
loading         anchors by reference, whole or only a route's blocks
bundle_tensors  which tensors a bundle holds
bundle_anchors  the anchors of a bundle, found and checked
measured        which weights the metrics of a table were measured on
whole           models that have no anchors to name
making          from_anchors
merging         PST merged into the weights
plain           one route as a plain model of Transformers
adapters        an anchor's LoRA to and from PEFT's adapter folders
export          one size as a model of its own
bundle_loading  from_pretrained
bundle_saving   save_pretrained, push_to_hub
trainable       which parts train
card            the model card of a bundle, or of a size that was exported
llama           decoders of LLaMA blocks
images          what every stitched image classifier is
vit, dinov2, swin, convnext, resnet, mobilenet_v2, mixed   one image family each
"""

from collections.abc import Iterable

from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .calibration import Calibration
from .configuration import StitchedConfig
from .convnext import StitchedConvNextConfig, StitchedConvNextForImageClassification
from .dinov2 import StitchedDinov2Config, StitchedDinov2ForImageClassification
from .images import StitchedForImageClassification, StitchedImageConfig
from .llama import StitchedLlamaConfig, StitchedLlamaForCausalLM
from .mixed import StitchedMixedConfig, StitchedMixedForImageClassification
from .mobilenet_v2 import StitchedMobileNetV2Config, StitchedMobileNetV2ForImageClassification
from .modeling_base import StitchedPreTrainedModel
from .resnet import StitchedResNetConfig, StitchedResNetForImageClassification
from .similar import JunctionProposal, propose_junctions
from .swin import StitchedSwinConfig, StitchedSwinForImageClassification
from .vit import StitchedViTConfig, StitchedViTForImageClassification

_CLASSES = (
    (AutoModelForCausalLM, StitchedLlamaForCausalLM),
    (AutoModelForImageClassification, StitchedViTForImageClassification),
    (AutoModelForImageClassification, StitchedSwinForImageClassification),
    (AutoModelForImageClassification, StitchedConvNextForImageClassification),
    (AutoModelForImageClassification, StitchedResNetForImageClassification),
    (AutoModelForImageClassification, StitchedDinov2ForImageClassification),
    (AutoModelForImageClassification, StitchedMobileNetV2ForImageClassification),
    (AutoModelForImageClassification, StitchedMixedForImageClassification),
)
CLASSES = {model_class.config_class.model_type: model_class for _, model_class in _CLASSES}
# Trainer shifts labels for these alone where it smooths them
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[StitchedLlamaConfig.model_type] = StitchedLlamaForCausalLM.__name__
for auto_class, model_class in _CLASSES:
    auto_class.register(model_class.config_class, model_class, exist_ok=True)


def image_class(families: Iterable[str]) -> type[StitchedForImageClassification]:
    """The class that stitches anchors of these `model_type`s.

    Raises:
        ValueError: a family that is not supported.
    """
    found = {"vit" if family == "deit" else family for family in families}
    names = {name: CLASSES.get(f"stitched_{name}", StitchedPreTrainedModel) for name in found}
    if unknown := sorted(n for n, known in names.items() if not issubclass(known, StitchedForImageClassification)):
        raise ValueError(f"model_type {unknown[0]!r} is no image family that can be stitched")
    return names.popitem()[1] if len(names) == 1 else StitchedMixedForImageClassification


__all__ = [
    "CLASSES",
    "Calibration",
    "JunctionProposal",
    "StitchedConfig",
    "image_class",
    "propose_junctions",
    "StitchedConvNextConfig",
    "StitchedConvNextForImageClassification",
    "StitchedDinov2Config",
    "StitchedDinov2ForImageClassification",
    "StitchedMobileNetV2Config",
    "StitchedMobileNetV2ForImageClassification",
    "StitchedMixedConfig",
    "StitchedMixedForImageClassification",
    "StitchedForImageClassification",
    "StitchedImageConfig",
    "StitchedLlamaConfig",
    "StitchedLlamaForCausalLM",
    "StitchedPreTrainedModel",
    "StitchedResNetConfig",
    "StitchedResNetForImageClassification",
    "StitchedSwinConfig",
    "StitchedSwinForImageClassification",
    "StitchedViTConfig",
    "StitchedViTForImageClassification",
]
