"""Tensors that two anchors have in common are held once."""

import torch
from torch import nn
from transformers import PreTrainedModel


def share_embedding(small: PreTrainedModel, large: PreTrainedModel, index: int, parent: int) -> None:
    """Gives an anchor that kept the embedding and head of the model it was cut from that model's own modules.

    Parts that were not loaded, or lie in another dtype or on another device, stay as they are.

    Raises:
        ValueError: the weights differ, so that it was not cut from this model.
    """
    for get, name in (("get_input_embeddings", "embedding"), ("get_output_embeddings", "head")):
        own, other = getattr(small, get)(), getattr(large, get)()
        if isinstance(own, nn.Identity) or isinstance(other, nn.Identity) or own is other:
            continue
        a, b = own.weight, other.weight
        if a is b or a.is_meta or b.is_meta or (a.dtype, a.device) != (b.dtype, b.device):
            continue
        if not torch.equal(a, b):
            raise ValueError(
                f"anchor {index} says that it shares the {name} of the model it was cut from, and anchor {parent} has another one: "
                "give the model that it was cut from, or remove shrunk_from from its config.json"
            )
        own.weight = b
