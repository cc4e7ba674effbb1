"""Provenance of a result: date, commit, command, versions and machine, stored in every JSON result."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_HIDDEN = "<hidden>"
_SECRET_OPTION = re.compile(
    r"--?([\w-]*(token|key|password|passwd|secret|credentials?)|(push_to_)?hub[_-]t[\w-]*)", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)")
_PACKAGES = ("stitched-llama", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")


def provenance() -> dict[str, Any]:
    """Date, commit, command, package versions and machine of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "command": " ".join(redacted([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "device": device,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "model": _processor(),
        },
    }


def redacted(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: values of options named after a token, key, password or secret, and Hub tokens and logins in
    URLs anywhere in it."""
    shown, secret = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if secret and not argument.startswith("--"):
            argument = _HIDDEN
        elif _SECRET_OPTION.fullmatch(name) and equals:
            argument = f"{name}={_HIDDEN}"
        secret = bool(_SECRET_OPTION.fullmatch(argument))
        shown.append(_SECRET_TEXT.sub(_HIDDEN, argument))
    return shown


def dump_record(content: Any) -> str:
    """A result as JSON; numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str | None:
    """The processor's name, from /proc/cpuinfo where that exists."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _commit() -> str | None:
    """The commit of the working tree, with a suffix for uncommitted changes; None outside a checkout."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
