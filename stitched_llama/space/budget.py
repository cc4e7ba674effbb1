"""Budgets: limits on parameters, memory or MACs, parsed from text such as `9B`, `12GB` or `8 GMACs`."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from .stitch import Stitch

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MACS = _DECIMAL | {"g": 10**9}
_BYTES = {unit + "b": 1000**i for i, unit in enumerate(("", "k", "m", "g", "t"))} | {
    unit + "ib": 1024**i for i, unit in enumerate(("", "k", "m", "g", "t")) if unit
}
_LARGEST_FIRST = (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3))
_TIMES = ("ms", "s", "tok/s", "tokens/s")
_EXAMPLES = "examples: '9B' or 9e9 (parameters), '12GB' (weights and KV cache), '8 GMACs' (a token or image)"


@dataclass(frozen=True)
class Budget:
    """An upper limit on one cost.

    Attributes:
        kind: `"params"`, `"memory_bytes"` (weights and the KV cache of the context; what PST adds is not counted, see
            `Stitch`) or `"macs"`.
        limit: in units of that cost.
        text: as the user wrote it.
    """

    kind: str
    limit: float
    text: str

    @classmethod
    def parse(cls, budget: "str | int | float | Budget") -> "Budget":
        """Reads a budget; a bare number counts parameters.

        Raises:
            ValueError: the text is no budget, is in a unit that needs a device profile, or is `24G`, which may be parameters or
                memory.
        """
        if isinstance(budget, Budget):
            return budget
        text = str(budget).strip()
        match = re.fullmatch(
            r"((?:\d{1,3}(?:[,_]\d{3})+|\d+)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?)\s*([a-zA-Z/]*)", text, re.ASCII
        )
        if not match or isinstance(budget, bool):
            raise ValueError(f"budget {text!r} cannot be read; {_EXAMPLES}")
        number, unit = Decimal(match[1].replace(",", "").replace("_", "")), match[2].lower()
        if unit in _TIMES:
            raise ValueError(f"budget {text!r} is a time: that needs a profile of the device; {_EXAMPLES}")
        if number <= 0:
            raise ValueError(f"budget {text!r} is not above zero; {_EXAMPLES}")
        if unit.endswith("macs") and unit[:-4] in _MACS:
            return cls("macs", float(number * _MACS[unit[:-4]]), text)
        if unit == "g":
            raise ValueError(
                f"budget {text!r} may be parameters or memory: write '{match[1]}B' for parameters, '{match[1]}GB' for memory"
            )
        if unit in _DECIMAL:  # "b" alone is billions of parameters, not bytes
            return cls("params", float(number * _DECIMAL[unit]), text)
        if unit in _BYTES:
            return cls("memory_bytes", float(number * _BYTES[unit]), text)
        raise ValueError(f"budget {text!r} has the unknown unit {match[2]!r}; {_EXAMPLES}")

    def cost_of(self, stitch: Stitch, context_tokens: int = 0) -> float:
        """The cost of a stitch that this budget limits; `context_tokens` is the length of the KV cache."""
        if self.kind == "memory_bytes":
            return stitch.weight_bytes + context_tokens * stitch.kv_bytes_per_token
        return stitch.macs if self.kind == "macs" else stitch.params

    def fits(self, stitch: Stitch, context_tokens: int = 0) -> bool:
        return self.cost_of(stitch, context_tokens) <= self.limit


def format_count(number: float) -> str:
    """`6906982400` as `6.907B`: four digits, rounded up, so that used as a budget it fits the stitch it describes."""
    number = math.ceil(number)
    step = 10 ** max(0, len(str(number)) - 4)
    number = -(-number // step) * step
    unit, size = next((pair for pair in _LARGEST_FIRST if number >= pair[1]), ("", 1))
    return f"{number / size:.3f}".rstrip("0").rstrip(".") + unit


def format_bytes(number: float) -> str:
    """`12000000000` as `12GB`."""
    return format_count(number).replace("B", "G") + "B"
