"""What a `config.json` may say, of a bundle or of an anchor: checked before Transformers builds anything of it.

Whoever made a bundle may have written anything into it. Sizes are bounded by what is there, and nothing names code.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from stitched_llama.space import MOST_STITCHES, anchor_spec

MOST_LABELS = 100_000  # that a config may ask for by number alone; Transformers makes a name for each
_MOST_ANCHORS = 64
_ATTENTION = (None, "eager", "sdpa", "flex_attention")  # what Transformers and torch have themselves


def check_anchor_fields(fields: Any, where: str, attention: bool = False) -> None:
    """Refuses an anchor's configuration that would take memory for classes without names, or that names code.

    Args:
        attention: the caller chose the attention, whatever is written here.

    Raises:
        ValueError: names `where`, the field and its value.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} is a {type(fields).__name__} where an object is needed")
    count = fields.get("num_labels")
    if not fields.get("id2label") and count is not None and not (_is_whole(count) and 0 <= count <= MOST_LABELS):
        raise ValueError(f"num_labels of {where} is {count!r}: at most {MOST_LABELS:,} without their names, id2label")
    for name, value in _nested(fields):
        chosen = name.endswith(("attn_implementation", "experts_implementation", "attn_implementation_internal"))
        if chosen and not attention and not (isinstance(value, (str, NoneType)) and value in _ATTENTION):
            raise ValueError(
                f"{name} of {where} is {value!r}, which may be code from elsewhere: pass attn_implementation yourself, or remove it"
            )


def check_bundle_fields(fields: Mapping[str, Any], where: str, config_class: type) -> None:
    """Refuses a bundle's configuration that cannot belong to its weights, before anything is built.

    Raises:
        ValueError: names `where`, the field and both values.
    """
    check_anchor_fields({**fields, "anchor_configs": None}, where)
    check_shadows(fields, where, config_class)
    keys, dtype = fields.get("keys"), fields.get("stitching_dtype")
    if isinstance(keys, list) and len(keys) > MOST_STITCHES:
        raise ValueError(f"keys of {where} has {len(keys):,} entries: a space has at most {MOST_STITCHES:,} stitches")
    if dtype not in (None, "int8"):
        raise ValueError(f"stitching_dtype of {where} is {dtype!r}: null or 'int8' is needed")
    configs, anchors = fields.get("anchor_configs"), fields.get("anchors")
    if not isinstance(configs, (list, NoneType)) or len(configs or []) > _MOST_ANCHORS:
        raise ValueError(
            f"anchor_configs of {where} is {repr(configs)[:200]}: a list of at most {_MOST_ANCHORS} is needed"
        )
    if isinstance(anchors, list) and isinstance(configs, list) and len(anchors) != len(configs):
        raise ValueError(f"{where} has {len(configs)} anchor_configs and {len(anchors)} anchors: as many are needed")
    for index, own in enumerate(configs or []):
        check_anchor_fields(own, f"anchor {index} of {where}")
        depth = anchor_spec(own).depth
        if anchors and depth > (parts := len(anchors[index]["fingerprint"])):
            raise ValueError(
                f"anchor {index} of {where} has {depth} blocks, its fingerprint is of {parts} parts: it was changed"
            )


def check_shadows(fields: Mapping[str, Any], where: str, owner: type) -> None:
    """Refuses fields that would take the place of a method of `owner`, on which Transformers sets them as attributes.

    Raises:
        ValueError: names the first.
    """
    if shadows := [n for n in fields if n != "model_type" and _is_behaviour(getattr(owner, n, None))]:
        raise ValueError(f"{where} has the field {shadows[0]!r}, which is no setting: it was changed")


def _nested(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All names and values, of objects and lists inside too."""
    found, rest = [], [fields]
    while rest:
        content = rest.pop()
        pairs = list(content.items()) if isinstance(content, Mapping) else [("", value) for value in content]
        found += [(str(name), value) for name, value in pairs]
        rest += [value for _, value in pairs if isinstance(value, (Mapping, list))]
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_behaviour(attribute: Any) -> bool:
    return callable(attribute) or (isinstance(attribute, property) and attribute.fset is None)
