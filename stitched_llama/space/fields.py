"""Fields of a `config.json`, checked for type and range before anything is built from them.

In each function null or a missing field gives `default`; a ValueError names the field, its value and what is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]

MOST = 10**9  # of any size: wider than any layer, longer than any vocabulary
MOST_BLOCKS = 512
_MOST_STAGES = 16


def positive(config: Config, name: str, default: int | None = None, most: int = MOST) -> int:
    """A whole number above zero, at most `most`.

    Raises:
        ValueError: it is missing without a default, or something else.
    """
    value = _value(config, name, default)
    if not _is_whole(value, 1, most):
        raise _refusal(config, name, value, f"a whole number above 0, at most {most:,},")
    return int(value)


def positives(config: Config, name: str, default: Sequence[int], most: int = MOST) -> tuple[int, ...]:
    """A list of whole numbers above zero, one a stage.

    Raises:
        ValueError: it is something else, or there are more than 16.
    """
    value = _value(config, name, default)
    if not _is_list(value, range(1, _MOST_STAGES + 1)) or not all(_is_whole(entry, 1, most) for entry in value):
        raise _refusal(config, name, value, f"a list of 1 to {_MOST_STAGES} whole numbers of 1 to {most:,}")
    return tuple(value)


def depths_of(config: Config, default: Sequence[int], *others: tuple[str, Sequence[int]]) -> tuple[int, ...]:
    """The blocks of each stage; the number of stages must agree with `others` and with `num_stages`, if given.

    Raises:
        ValueError: no list of whole numbers, more than 512 blocks in all, or another number of stages than `others` have.
    """
    depths = positives(config, "depths", default, MOST_BLOCKS)
    if sum(depths) > MOST_BLOCKS:
        raise _refusal(config, "depths", list(depths), f"at most {MOST_BLOCKS} blocks in all")
    stages = {name: len(values) for name, values in others}
    if config.get("num_stages") is not None:
        stages["num_stages"] = positive(config, "num_stages")
    for name, count in stages.items():
        if count != len(depths):
            raise ValueError(f"the {family_of(config)} config has {len(depths)} depths and {count} stages by {name}")
    return depths


def pair(config: Config, name: str, default: int | None = None) -> tuple[int, int]:
    """(height, width): one whole number above zero for both, or a list of two.

    Raises:
        ValueError: it is missing without a default, or something else.
    """
    value = _value(config, name, default)
    sides = list(value) if _is_list(value, range(2, 3)) else [value, value]
    if not all(_is_whole(side, 1, MOST) for side in sides):
        raise _refusal(config, name, value, "a whole number above 0, or a list of two,")
    return sides[0], sides[1]


def ratio(config: Config, name: str, default: float, least: float = 0.0) -> float:
    """A finite number above `least`, at most a million.

    Raises:
        ValueError: it is something else.
    """
    value = _value(config, name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (least < value <= 10**6):
        raise _refusal(config, name, value, f"a number above {least:g}, at most a million,")
    return value


def switch(config: Config, name: str, default: bool = False) -> bool:
    """True or false.

    Raises:
        ValueError: it is something else, such as the text "false".
    """
    value = _value(config, name, default)
    if not isinstance(value, bool):
        raise _refusal(config, name, value, "true or false")
    return value


def label_count(config: Config) -> int:
    """Classes: entries of `id2label`, or else `num_labels`.

    Raises:
        ValueError: `id2label` is no object, or `num_labels` no whole number.
    """
    names = config.get("id2label")
    if names is not None and not isinstance(names, Mapping):
        raise _refusal(config, "id2label", names, "an object of class names")
    if names:
        return len(names)
    count = _value(config, "num_labels", 2)
    if not _is_whole(count, 0, MOST):
        raise _refusal(config, "num_labels", count, f"a whole number of 0 to {MOST:,}")
    return int(count)


def family_of(config: Config) -> str:
    return str(config.get("model_type", "?"))


def _value(config: Config, name: str, default: Any) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"the {family_of(config)} config has no field {name!r}")
    return value


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: Any, lengths: range) -> bool:
    return isinstance(value, (list, tuple)) and len(value) in lengths


def _refusal(config: Config, name: str, value: Any, needed: str) -> ValueError:
    return ValueError(f"{name} of the {family_of(config)} config is {repr(value)[:200]}: {needed} is needed")
