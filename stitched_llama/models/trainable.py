"""Which parts of a stitched model train: counted, listed for a stitch, frozen for a phase."""

from typing import Any

from torch import nn

from stitched_llama.pst import StitchLora, is_low_rank
from stitched_llama.space import Stitch


class TrainableParts:
    """What trains in a stitched model."""

    anchors: nn.ModuleList
    stitch_lora: StitchLora | None
    config: Any
    named_parameters: Any
    stitch: Any
    block_prefix: Any
    trained_heads: Any
    _trains_whole: Any

    def trainable_parameters(self) -> dict[str, int]:
        """Numbers that train, by part, counted on the built tensors."""
        full = self.config.pst is not None and self.config.pst_config.full
        parts = ("anchors", "stitching_layers") if full else ("lora", "stitching_layers", "stitch_bias")
        counts = dict.fromkeys(parts if self.stitch_lora is None else (*parts, "stitch_lora"), 0)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                if part == "anchors" and not full:
                    part = "lora" if is_low_rank(name) else "heads"
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    def print_trainable_parameters(self) -> None:
        """Prints what trains, part by part, against all parameters (as PEFT does)."""
        counts = self.trainable_parameters()
        total = sum(anchor.num_parameters() for anchor in self.anchors)  # two to a byte where they are in 4 bits
        total += sum(p.numel() for name, p in self.named_parameters() if not name.startswith("anchors."))
        trained = sum(counts.values())
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        print(
            f"trainable params: {trained:,} ({parts}) || all params: {total:,} || trainable: {100 * trained / total:.4f} %"
        )

    def stitch_parameters(self, stitch_id: int | str) -> list[tuple[str, nn.Parameter]]:
        """The named trainable tensors that lie on one stitch's route; of anchors that train whole, with all that they have
        outside their blocks."""
        stitch = self.stitch(stitch_id)
        blocks = tuple(self.block_prefix(*block) for block in stitch.blocks())
        prefixes = [f"stitching_layers.{layer}." for layer in stitch.layers]
        prefixes += [*blocks, *self.trained_heads({stitch.segments[-1].anchor})]
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        bias = f"stitch_bias.vectors.{stitch.key}"  # not a prefix: a key may begin another's
        return [
            (name, parameter)
            for name, parameter in named
            if name == bias
            or name.startswith(tuple(prefixes))
            or self._is_stitch_lora(name, stitch)
            or self._trains_whole(name, [stitch], blocks)
        ]

    def _is_stitch_lora(self, name: str, *stitches: Stitch) -> bool:
        """Whether a tensor is of the LoRA of the stitches and lies on one of these routes."""
        if self.stitch_lora is None or not name.startswith("stitch_lora."):
            return False
        blocks = {block for stitch in stitches if not stitch.is_anchor for block in stitch.blocks()}
        return name.split(".")[-1] in {layer for block in blocks for layer in self.stitch_lora.layers[block]}

    def train_only(self, part: str | None = None) -> None:
        """Freezes what does not belong to a phase of training where stitches have a LoRA of their own.

        Args:
            part: `"anchors"`, each anchor's LoRA (and head); `"stitches"`, their LoRA, biases and stitching layers; None, all of
                them.

        Raises:
            ValueError: another part, or the stitches have no LoRA of their own (`PSTConfig(stitch_rank=...)`).
        """
        if part not in ("anchors", "stitches", None):
            raise ValueError(f"part {part!r} is unknown; 'anchors', 'stitches' or None is needed")
        if self.stitch_lora is None:
            raise ValueError(
                "anchors and stitches share one LoRA here: attach_pst(PSTConfig(stitch_rank=...)) parts them"
            )
        if not hasattr(self, "_phases"):
            named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
            self._phases = {
                "anchors": [p for name, p in named if name.startswith("anchors.")],
                "stitches": [p for name, p in named if not name.startswith("anchors.")],
            }
        for name, parameters in self._phases.items():
            for parameter in parameters:
                parameter.requires_grad_(part in (name, None))
