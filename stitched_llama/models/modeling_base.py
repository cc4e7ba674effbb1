"""What every stitched model is, whatever its family: frozen anchors, stitching layers, a space and its table."""

import copy
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from stitched_llama.anchors import FAMILIES
from stitched_llama.layers import StitchingLayer
from stitched_llama.pst import PSTConfig, StitchBias, StitchLora, attach_pst, refuse_another
from stitched_llama.space import BYTES_PER_NUMBER, Precision, Stitch

from .adapters import AdapterMixin
from .bundle_loading import BundleLoading
from .bundle_saving import BundleSaving
from .calibration import Calibration, calibrate
from .configuration import StitchedConfig
from .export import ExportMixin
from .making import AnchorsMixin
from .merging import MergingMixin, loaded_bits
from .route import first_norm
from .shared import share_embedding
from .trainable import TrainableParts

NO_BUDGET = "forward takes a stitch_id, no budget: pass stitch_id=model.choose(budget).stitch_id"


class BlockOutputs(NamedTuple):
    """What enters and what leaves each block of an anchor, in the layout of its family."""

    enters: list[Tensor]
    leaves: list[Tensor]


class StitchedPreTrainedModel(
    AnchorsMixin, BundleLoading, BundleSaving, MergingMixin, ExportMixin, AdapterMixin, TrainableParts, PreTrainedModel
):
    """Base of the stitched models.

    The route is an argument of `forward` (`stitch_id=`), never a mode; every method that names a stitch takes an id or
    a key.

    Attributes:
        space: all stitches, with exact costs.
        table: metrics and importance of the stitches, and which are published.
        anchors: the frozen pretrained models, small to large.
        stitching_layers: by name, as `Junction.layer` names them.
        stitch_bias: the biases of PST, or None.
        stitch_lora: the LoRA of PST that stitches between the anchors share, or None.
        keys: the stitches that can run; fewer than the space when a bundle was loaded for one size.
    """

    config_class = StitchedConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def __init__(self, config: StitchedConfig, anchors: Sequence[nn.Module] | None = None):
        pst = None
        if anchors is None and (config.anchors or config.pst):  # weights of its own, which are no named anchor's
            config, pst = copy.deepcopy(config), config.pst_config
            config.anchors = config.pst = None
        super().__init__(config)
        self.space = config.stitch_space()
        self.families = [FAMILIES[spec.family] for spec in self.space.anchors]
        self.keys = [s.key for s in self.space] if config.keys is None else list(config.keys)
        if anchors is None:
            chosen = self.config._attn_implementation
            how = {} if chosen in (None, "sdpa") else {"attn_implementation": chosen}  # else each family's default
            configs = [config.anchor_config(i) for i in range(len(self.families))]
            anchors = [family.auto_class().from_config(own, **how) for family, own in zip(self.families, configs)]
        self.anchors = nn.ModuleList(anchors)
        for index, spec in enumerate(self.space.anchors):
            if spec.shared_with is not None:
                share_embedding(self.anchors[index], self.anchors[spec.shared_with], index, spec.shared_with)
        self.stitching_layers = nn.ModuleDict()
        for stitch in map(self.space.__getitem__, self.keys):
            for junction in stitch.junctions:
                if junction.layer is not None and junction.layer not in self.stitching_layers:
                    self.stitching_layers[junction.layer] = self._new_stitching_layer(junction)
        self.stitch_bias: StitchBias | None = None
        self.stitch_lora: StitchLora | None = None
        self.requires_grad_(False)
        self.post_init()
        self._count_bytes_as_loaded()
        if pst is not None:
            self.attach_pst(pst)

    def get_expanded_tied_weights_keys(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Same as in Transformers, of the pairs that are loaded: one size may hold an anchor's embedding or its head alone."""
        here = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        pairs = super().get_expanded_tied_weights_keys(*args, **kwargs)
        return {name: source for name, source in pairs.items() if {name, source} <= here}

    def initialize_weights(self) -> None:
        """Nothing to do: anchors come initialised, stitching layers initialise themselves."""

    def _new_stitching_layer(self, junction) -> StitchingLayer:
        spec = self.space.stitching_layers[junction.layer]
        block = self.blocks(junction.tail)[junction.tail_start]
        norm = first_norm(block)
        return StitchingLayer(
            in_width=spec.in_width,
            out_width=spec.out_width,
            adapter=spec.adapter,
            rescale=spec.rescale,
            norm=spec.norm,
            in_grid=spec.in_grid,
            out_grid=spec.out_grid,
            special_tokens=spec.special_tokens,
            step=spec.step,
            inner_width=spec.inner_width,
            dtype=norm.dtype,
            device=norm.device,
        )

    def _count_bytes_as_loaded(self) -> None:
        """Counts bytes in the dtype and quantisation that the anchors were loaded in."""
        dtype = str(next((layer.out_dtype for layer in self.stitching_layers.values()), self.dtype))
        name = dtype.removeprefix("torch.")
        if name in BYTES_PER_NUMBER:  # float64 has no place in a budget
            self.space = self.space.with_precision(Precision(name, loaded_bits(self.anchors)))

    def blocks(self, anchor: int) -> list[nn.Module]:
        """The blocks of an anchor, in order."""
        names = self.families[anchor].block_names(self.anchors[anchor])
        return [self.anchors[anchor].get_submodule(name) for name in names]

    def block_prefix(self, anchor: int, block: int) -> str:
        """How the names of a block's tensors begin in this model."""
        return f"anchors.{anchor}.{self.families[anchor].block_names(self.anchors[anchor])[block]}."

    def trained_heads(self, anchors: Iterable[int]) -> list[str]:
        """How the names of the tensors of those anchors' heads begin, where heads train; none do by default."""
        return []

    # ---- choosing a stitch

    def stitch(self, stitch_id: int | str | None = None) -> Stitch:
        """The stitch of an id or key; for None the configured default, or else the largest anchor, or the largest of what was
        loaded where that is not among it.

        Raises:
            ValueError: no such stitch, or its blocks were not loaded.
        """
        if stitch_id is None:
            default = self.config.default_stitch_id
            wanted = self.space.anchor_stitch(-1) if default is None else self.space[default]
            stitch_id = wanted.key if wanted.key in self.keys else self.keys[-1]
        stitch = self.space[stitch_id]
        if stitch.key not in self.keys:
            raise ValueError(
                f"stitch {stitch.stitch_id} ({stitch.key}) was not loaded: this model holds {len(self.keys)} of "
                f"{len(self.space)} stitches; load the bundle without stitch_id and budget for all of them"
            )
        return stitch

    def choose(self, budget: Any, context_tokens: int = 0) -> Stitch:
        """The best published stitch within `budget` (see `StitchTable.choose`).

        Raises:
            ValueError: the budget cannot be read, or is below the smallest size.
        """
        return self.table.choose(self.space, budget, context_tokens, keys=self.keys)

    @property
    def published(self) -> list[Stitch]:
        """The stitches a budget chooses from, ascending in parameters."""
        at_hand = [self.space[key] for key in self.keys]
        return [self.space[key] for key in self.table.published(at_hand)]

    def pinned(self, stitch_id: int | str | None = None, budget: Any = None):
        """A view of this model that always runs one stitch: for `assistant_model`, pipelines and evaluation harnesses.

        It shares every weight; its config and generation config are its own.

        Raises:
            ValueError: no such stitch, no size within the budget, or both given.
        """
        if stitch_id is not None and budget is not None:
            raise ValueError(f"stitch_id {stitch_id} and budget {budget!r} both given: pass one")
        stitch = self.choose(budget) if budget is not None else self.stitch(stitch_id)
        view = copy.copy(self)
        own = vars(self).get("forward")  # Accelerate's, or a compiled one: bound to this model, it would run its route
        if isinstance(own, MethodType):
            view.forward = MethodType(own.__func__, view)
        elif own is not None:
            view.forward = lambda *args, **how: own(*args, **{**how, "stitch_id": stitch.key})
        view.config = copy.deepcopy(self.config)
        if self.can_generate():
            view.generation_config = copy.deepcopy(self.generation_config)
        view.config.default_stitch_id = stitch.key
        view.pinned_key = stitch.key
        return view

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Same as in Transformers, before PST is attached.

        Raises:
            ValueError: PST is attached; another adapter would undo it.
        """
        if self.config.pst is not None or self.is_merged:
            refuse_another()
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Same as in Transformers, before PST is attached.

        Raises:
            ValueError: PST is attached; another adapter would undo it.
        """
        if self.config.pst is not None or self.is_merged:
            refuse_another()
        return super().load_adapter(*args, **kwargs)

    @property
    def _output_capturing_hooks_installed(self) -> bool:
        """Transformers' mark, kept where all views of a model see it: they share the blocks that the hooks are on."""
        return getattr(self.anchors, "captured", False)

    @_output_capturing_hooks_installed.setter
    def _output_capturing_hooks_installed(self, installed: bool) -> None:
        self.anchors.captured = installed

    pinned_key: str | None = None

    def _pinned_or(self, stitch_id: int | str | None) -> Stitch:
        """The stitch of a call; a view runs its own, as assisted generation hands the main model's keyword on to it."""
        return self.stitch(stitch_id if self.pinned_key is None else self.pinned_key)

    def _apply(self, *args: Any, **kwargs: Any):
        """Called by `to`, `half`, `bfloat16`, `float`, ...; the space then counts bytes in the new dtype."""
        moved = super()._apply(*args, **kwargs)
        moved._count_bytes_as_loaded()
        return moved

    # ---- preparing for training

    def _block_outputs(self, anchor: int, embedded: Tensor, context: Any) -> BlockOutputs:
        """What enters and leaves each block of one anchor running alone from what its embedding gave."""
        model, family, spec = self.anchors[anchor], self.families[anchor], self.space.anchors[anchor]
        enters, leaves, hidden = [], [], embedded
        for block in range(spec.depth):
            if block:
                hidden = family.approach(model, hidden, block)
            enters.append(hidden)
            hidden = family.run(model, hidden, block, block + 1, block, context)
            leaves.append(hidden)
        return BlockOutputs(enters, leaves)

    def calibrate(self, batches: Iterable[dict[str, Tensor]], **options: Any) -> Calibration:
        """Initialises the stitching layers by least squares (see `calibration.calibrate`)."""
        return calibrate(self, batches, **options)

    def attach_pst(self, config: PSTConfig = PSTConfig()) -> None:
        """Adds the trainable parts by declaration; everything else stays frozen and no output changes.

        Raises:
            ValueError: PST is attached already, or was merged, or a rank does not fit.

        Source: ESTA section 4.1; `PSTConfig(full=True)` SN-Net section 3.3.
        """
        if self.is_merged:
            raise ValueError("PST was merged into the weights: load the bundle without merge to train it on")
        if self.config.pst is not None:
            raise ValueError(f"PST is attached already ({self.config.pst}): load the anchors anew for other settings")
        self.stitch_bias, self.stitch_lora = attach_pst(
            self.anchors, self.stitching_layers, self.space, config, self.keys
        )
        self.config.pst = config.to_dict()
        self.table = self.table.in_training()
        self._count_bytes_as_loaded()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Same as in Transformers, but for reentrant checkpointing, which loses gradients behind a frozen embedding.

        Raises:
            ValueError: `use_reentrant` is asked for.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True loses gradients where the embedding is frozen: leave it False")
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        """Refused: every anchor has its own embedding and head.

        Raises:
            ValueError: always, with the way round.
        """
        raise ValueError("a stitched model cannot be resized: resize each anchor's vocabulary, then stitch them anew")
