"""What every stitched image classifier is, whatever its family; a family adds a name to each class."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

from stitched_llama.anchors import ImageContext
from stitched_llama.pst import PSTConfig, updates_of
from stitched_llama.space import ANY_SIZE, AnchorSpec, Junction, anchor_specs

from .configuration import StitchedConfig
from .modeling_base import NO_BUDGET, BlockOutputs, StitchedPreTrainedModel
from .processors import normalization, same_normalization
from .route import walk


@strict
class StitchedImageConfig(StitchedConfig):
    """Configuration of a stitched image classifier; see `StitchedConfig` for its own fields.

    Args:
        image_size: side of the images, or (height, width), for anchors that run at any (DINOv2, ConvNeXt, ResNet, MobileNetV2);
            by default the one they were trained at.
        normalization: for each anchor the `mean` and `std` of its image processor, as shares of the brightest number a picture has,
            or None where it has no processor; None where all have none.
        train_head: the classifiers train with PST and lie in the bundle (ESTA section 5.1: a head for the new task).

    The remaining fields describe it to Transformers and follow from the largest anchor.
    """

    image_size: int | list | None = None
    num_channels: int = 3
    hidden_size: int = 768
    train_head: bool = True
    normalization: list | None = None

    @classmethod
    def from_anchor_configs(cls, configs: Any, **options: Any):
        """As `StitchedConfig` has it.

        Raises:
            ValueError: also where anchors call a class by different names.
        """
        config = super().from_anchor_configs(configs, **options)
        named = [c["id2label"] for c in config.anchor_configs if c.get("id2label")]
        for index, labels in enumerate(named[1:], 1):
            for (number, first), other in zip(named[0].items(), labels.values()):
                if first != other and len(labels) == len(named[0]):
                    raise ValueError(
                        f"anchors do not belong together: class {number} is {first!r} in anchor 0 and {other!r} in anchor "
                        f"{index}; where they mean the same classes, say so by id2label"
                    )
        return config

    def anchor_specs(self) -> list[AnchorSpec]:
        return anchor_specs(self.anchor_configs, self.image_size)

    def __post_init__(self, **kwargs: Any):
        labels = self.anchor_configs[-1].get("id2label") if self.anchor_configs else None
        if labels and self.id2label is None:  # JSON made texts of the numbers
            self.id2label = {int(number): label for number, label in labels.items()}
            self.label2id = {label: number for number, label in self.id2label.items()}
        super().__post_init__(**kwargs)
        if self.anchor_configs:
            spec = self.stitch_space().anchors[-1]
            self.image_size, self.num_channels = spec.contract["image_size"], spec.contract["num_channels"]
            self.hidden_size = spec.width


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuses labels [batch] that are none of the classes; a GPU would only say that an assertion failed.

    Raises:
        ValueError: names the label and the number of classes.
    """
    if torch.compiler.is_compiling() or labels.is_floating_point() or not labels.numel():
        return
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"label {lowest if lowest < 0 else highest} is outside the {classes} classes: give from_anchors num_labels, or "
            "check the data"
        )


class StitchedForImageClassification(StitchedPreTrainedModel):
    """Every size between two or more frozen image classifiers.

    Source: SN-Net section 3, ESTA section 5.1.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    config_fields = ("num_labels", "id2label", "label2id")
    own_fields = ("image_size",)
    gradient_checkpointing = False  # Transformers switches it, for blocks that do not see to it themselves
    _supports_sdpa = True

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        stitch_id: int | str | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """Runs one stitch.

        Args:
            pixel_values: [batch, channels, height, width], as the largest anchor's image processor gives them; a route that
                begins in an anchor whose processor normalises otherwise sees them normalised so.
            labels: [batch] classes.
            stitch_id: id or key; None takes the default of the configuration.

        Returns:
            `logits` [batch, classes], and `loss` where labels are given.

        Raises:
            ValueError: no such stitch, images of another size or channel count, or a label outside the classes.
        """
        if "budget" in kwargs:
            raise ValueError(NO_BUDGET)
        said = {name for name, value in kwargs.items() if value is not None and value is not False}
        if unknown := sorted(said - {"num_items_in_batch"}):
            raise TypeError(f"forward of stitched image models got unknown arguments {unknown}")
        stitch = self._pinned_or(stitch_id)
        first, last = stitch.segments[0].anchor, stitch.segments[-1].anchor
        hidden = self._embed(first, pixel_values)
        updates = updates_of(stitch, self.stitch_bias, self.stitch_lora)
        checkpoint = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        context = ImageContext(updates, checkpoint)
        hidden = walk(self.families, self.space.anchors, self.anchors, self.stitching_layers, stitch, hidden, context)
        logits = self.families[last].head(self.anchors[last], hidden)
        loss = None
        if labels is not None:
            check_labels(labels, self.config.num_labels)
            count = kwargs.get("num_items_in_batch")
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=count)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def _embed(self, anchor: int, pixel_values: Tensor) -> Tensor:
        self._check_images(pixel_values)
        dtype = next(p.dtype for p in self.anchors[anchor].parameters() if p.is_floating_point())
        pixel_values = self._normalized_for(anchor, pixel_values)
        return self.families[anchor].embed(self.anchors[anchor], pixel_values.to(dtype))

    def _normalized_for(self, anchor: int, pixel_values: Tensor) -> Tensor:
        """[batch, channels, height, width], normalised by the largest anchor's processor, as by the own one of `anchor`."""
        known = [scale for scale in self.config.normalization or [] if scale is not None]
        if not known or same_normalization(self.config.normalization[anchor], known[-1]):
            return pixel_values
        given, wanted = (
            {name: pixel_values.new_tensor(values).view(-1, 1, 1) for name, values in scale.items()}
            for scale in (known[-1], self.config.normalization[anchor])
        )
        return (pixel_values * given["std"] + given["mean"] - wanted["mean"]) / wanted["std"]

    @classmethod
    def check_names(cls, config: StitchedImageConfig, names: Sequence[Any], **hub: Any) -> None:
        """Finds out how each anchor's image processor normalises."""
        places = [name if isinstance(name, str) else getattr(name, "name_or_path", None) for name in names]
        scales = [normalization(place, **hub) if place else None for place in places]
        config.normalization = scales if any(scales) else None
        if any(scales) and None in scales:
            logging.getLogger(__name__).warning(
                "anchor %d has no image processor: its images are taken to be normalised as those of the others",
                scales.index(None),
            )

    def _check_images(self, pixel_values: Tensor) -> None:
        size = self.config.image_size
        wanted = [self.config.num_channels, *((size, size) if isinstance(size, int) else size)]
        found = list(pixel_values.shape[1:])
        if found == wanted:
            return
        fix = "prepare the images with the bundle's image processor"
        if found[:1] != wanted[:1] == [1]:
            fix += ", from grey ones (ImageSet(..., channels=1), or convert('L'))"
        if found[:1] == wanted[:1] and len(found) == 3 and all(spec.family in ANY_SIZE for spec in self.space.anchors):
            side = found[1] if found[1] == found[2] else tuple(found[1:])
            fix += f", or make the model for their size, which these anchors can run at: from_anchors(..., image_size={side})"
        raise ValueError(f"pixel_values have [channels, height, width] {found}, these anchors take {wanted}: {fix}")

    def train(self, mode: bool = True):
        """Same as `nn.Module.train`, but batch norms of the anchors, and of stitching layers that do not train, keep their running
        statistics."""
        super().train(mode)
        frozen = [
            layer for layer in self.stitching_layers.values() if not any(p.requires_grad for p in layer.parameters())
        ]
        for part in [*self.anchors, *frozen]:
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    # ---- heads that train

    def attach_pst(self, config: PSTConfig = PSTConfig()) -> None:
        """As `StitchedPreTrainedModel` has it; the heads train too, in float32, unless `config.train_head` is off.

        Raises:
            ValueError: PST is attached already, or a rank does not fit.

        Source: ESTA section 5.1.
        """
        super().attach_pst(config)
        if self.config.train_head:
            for family, anchor in zip(self.families, self.anchors):
                for name in family.head_modules:
                    anchor.get_submodule(name).float().requires_grad_(True)

    def trained_heads(self, anchors: Any) -> list[str]:
        if not self.config.train_head:
            return []
        return [f"anchors.{index}.{name}." for index in anchors for name in self.families[index].head_modules]

    # ---- what calibration asks

    calibration_inputs = ("pixel_values", "labels")

    @torch.no_grad()
    def block_outputs(self, anchor: int, pixel_values: Tensor, labels: Tensor | None = None) -> BlockOutputs:
        """Activations of one anchor running alone, in its own layout; no gradients.

        Shapes: pixel_values [batch, channels, height, width].

        Raises:
            ValueError: images of another size or channel count.
        """
        return self._block_outputs(anchor, self._embed(anchor, pixel_values), ImageContext())

    def row_masks(self, batch: dict[str, Tensor], junction: Junction, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, places]: all of them, and those that are no class or distillation token."""
        kept = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        ends = self.space.anchors[junction.head], self.space.anchors[junction.tail]
        special = min(ends[0].leaves[0].special_tokens, ends[1].enters[0].special_tokens)
        rest = kept.clone()
        rest[:, :special] = False
        return kept, rest

    def calibration_loss(self, batch: dict[str, Tensor], key: str) -> tuple[float, int]:
        """Cross-entropy, nats an image, and the images it is over: none without labels."""
        if "labels" not in batch:
            return 0.0, 0
        return float(self(**batch, stitch_id=key).loss), len(batch["labels"])

    def raw_logits(self, batch: dict[str, Tensor], key: str) -> Tensor:
        """[images, classes]."""
        return self(pixel_values=batch["pixel_values"], stitch_id=key).logits
