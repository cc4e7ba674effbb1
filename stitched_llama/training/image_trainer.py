"""`StitchTrainer` for image classifiers."""

from typing import Any

import torch
from torch import Tensor, nn

from stitched_llama.models.images import check_labels
from stitched_llama.space import Stitch

from .checks import check_teacher_images
from .image_sets import EpochOfAugmentation
from .trainer import StitchTrainer


class StitchImageTrainer(StitchTrainer):
    """`StitchTrainer` for image classifiers: one label an image (ESTA section 5.1).

    Raises:
        ValueError: as `StitchTrainer`, or the `teacher` expects images with another normalisation.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.teacher is not None:
            check_teacher_images(self.model.config, self.teacher)
        self.add_callback(EpochOfAugmentation)

    def _label_count(self, labels: Tensor) -> Tensor:
        return torch.tensor(len(labels), device=labels.device)

    def _response_logits(
        self, model: nn.Module, inputs: dict, labels: Tensor, stitch: Stitch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [batch, classes] and labels [batch]."""
        route = {} if stitch is None else {"stitch_id": stitch.key}
        logits = model(**inputs, **route).logits.float()
        check_labels(labels, logits.shape[-1])
        return logits, labels.to(logits.device)
