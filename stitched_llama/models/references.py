"""How a bundle names its anchors, and how it tells when one is no longer what it was trained on."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from stitched_llama.bundles import WEIGHTS, fingerprint_files, fingerprint_tensors, read_header
from stitched_llama.pst import carries_adapters
from stitched_llama.space import anchor_spec, first_line, named, read_object

from .config_fields import check_anchor_fields

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
WHOLE_BELOW = 2**30  # bytes of an anchor that are read whole at every load
_INDEX = "model.safetensors.index.json"


def anchor_config(
    name_or_path: str, trust_remote_code: bool = False, attention: bool = False, **options: Any
) -> PreTrainedConfig:
    """The configuration of an anchor from its own files.

    Args:
        trust_remote_code: run the code that its folder or repository brings; never without it.
        attention: the caller chose the attention, whatever the configuration says.
        options: of the Hub, and fields of the configuration to set.

    Raises:
        ValueError: the files of an adapter lie beside it.
        OSError: there is none.
        ValueError: a field cannot be, the family is not supported, or it names code.
    """
    fields = check_source(name_or_path, attention, **options)
    with named(f"the config.json of anchor {name_or_path!r}"):
        if not trust_remote_code:
            anchor_spec(fields)  # of a family that needs no code but ours
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)


def check_source(name_or_path: str, attention: bool = False, **options: Any) -> dict[str, Any]:
    """The fields of a model's `config.json`, of whatever family, once Transformers may load it: nothing there brings code or an adapter.

    Args:
        attention, options: as `anchor_config` has them.

    Raises:
        ValueError: the files of an adapter lie beside it, a field cannot be or names code.
        OSError: there is none.
    """
    check_no_adapter(name_or_path, **options)
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    try:
        with named(f"the config.json of anchor {name_or_path!r}"):
            fields, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        if not fields:
            raise OSError("it has no config.json")
    except OSError as error:
        raise OSError(
            f"anchor {name_or_path!r} is neither a folder here with a config.json nor a repository in reach: {first_line(error)}"
        ) from error
    with named(f"the config.json of anchor {name_or_path!r}"):
        check_anchor_fields(fields, f"the config.json of anchor {name_or_path!r}", attention)
    return fields


def check_no_adapter(name_or_path: str, **hub: Any) -> None:
    """Refuses a folder or repository that also holds an adapter: Transformers would attach it to the model unasked.

    Raises:
        ValueError: it does.
    """
    hub = {name: value for name, value in hub.items() if name in HUB_OPTIONS and value is not None}
    try:
        found = find_adapter_config_file(name_or_path, **hub)
    except OSError:  # out of reach, which is told where its configuration is read
        return
    if found is not None:
        raise ValueError(
            f"{name_or_path} holds an adapter ({ADAPTER_CONFIG_NAME}), which would be attached to the anchor unasked: merge it "
            "(PEFT's merge_and_unload, then save_pretrained elsewhere), or take a folder that holds the model alone"
        )


def weight_files(name_or_path: str, needed: Callable[[str], bool] | None = None, **hub: Any) -> dict[str, Path]:
    """Tensor name -> safetensors file that holds it, of a folder or Hub repository; fetches only files that are needed. One
    file goes before shards, as in Transformers.

    Raises:
        ValueError: there are no safetensors weights.
    """
    hub = {name: value for name, value in hub.items() if name in HUB_OPTIONS and value is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    weights = cached_file(name_or_path, WEIGHTS, **quiet, **hub)
    if weights is not None:
        header, _ = read_header(Path(weights))
        return {tensor: Path(weights) for tensor in header if needed is None or needed(tensor)}
    index = cached_file(name_or_path, _INDEX, **quiet, **hub)
    if index is None:
        raise ValueError(f"{name_or_path} has no {WEIGHTS}: only safetensors weights are read; convert it first")
    shards = read_object(Path(index)).get("weight_map")
    texts = isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values())
    if not texts or any(Path(shard).is_absolute() or ".." in Path(shard).parts for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map of files beside it: copy or download it again")
    wanted = {tensor: shard for tensor, shard in shards.items() if needed is None or needed(tensor)}
    files = {shard: Path(cached_file(name_or_path, shard, **hub)) for shard in sorted(set(wanted.values()))}
    return {tensor: files[shard] for tensor, shard in wanted.items()}


def digests_of_files(
    paths: Iterable[Path], whole: bool | None = None, parts: Callable[[str], bool] | None = None
) -> dict[str, dict[str, str]]:
    """`fingerprint`, of samples, and `digests`, of all bytes, of the parts of an anchor.

    Args:
        whole: whether all bytes are read; None where the files have less than a GiB.
        parts: those that are wanted; all by default.
    """
    paths = sorted(set(paths))
    if whole is None:
        whole = sum(path.stat().st_size for path in paths) < WHOLE_BELOW
    found = {"fingerprint": fingerprint_files(paths, parts=parts)}
    return found | ({"digests": fingerprint_files(paths, whole=True, parts=parts)} if whole else {})


def digests_in_memory(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """The same of an anchor that was handed over as an object."""
    weights = _weights(model)
    return {"fingerprint": fingerprint_tensors(weights), "digests": fingerprint_tensors(weights, whole=True)}


def reference_to(model: PreTrainedModel) -> dict[str, Any]:
    """How a bundle names an anchor that was handed over as an object: by the files it came from if it still equals
    them (in its own dtype), else by its weights in memory alone."""
    name = model.name_or_path
    try:
        files = weight_files(name) if name else {}
        equal = bool(files) and _equals_files(model, files)
    except (ValueError, OSError, RuntimeError):
        equal = False
    if not equal:
        return {"name_or_path": None, "revision": None, **digests_in_memory(model)}
    return {"name_or_path": name, "revision": commit_of(files), **digests_of_files(files.values(), whole=True)}


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: parameters and running statistics, those that are tied once."""
    kept = model.state_dict().keys() - set(model.all_tied_weights_keys)
    return {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name in kept}


def _equals_files(model: PreTrainedModel, files: Mapping[str, Path]) -> bool:
    """Whether every floating-point weight is in the files and equal; what is quantised in memory is left out."""
    own = {name: tensor for name, tensor in _weights(model).items() if tensor.is_floating_point()}

    def equal(name: str, stored: Tensor) -> bool:
        return torch.equal(stored.to(own[name].dtype), own[name].cpu())

    if own.keys() <= files.keys():
        for path in set(files.values()):
            with safe_open(path, framework="pt") as file:
                if not all(equal(name, file.get_tensor(name)) for name in own if files[name] == path):
                    return False
        return True
    # older checkpoints name their tensors otherwise; only Transformers knows which is which
    stored, info = type(model).from_pretrained(model.name_or_path, use_safetensors=True, output_loading_info=True)
    found = _weights(stored)
    return not info["missing_keys"] and all(name in found and equal(name, found[name].cpu()) for name in own)


def check_plain(model: PreTrainedModel, index: int) -> None:
    """Refuses a model that adapters or PST were put into: their outputs would be taken for the anchor's.

    Raises:
        ValueError: there is something in it, or a part of it was offloaded.
    """
    if type(model).__name__.endswith("WithTeacher"):
        raise ValueError(
            f"anchor {index} is a {type(model).__name__}, which has two heads: hand over a DeiTForImageClassification"
        )
    if carries_adapters(model):
        raise ValueError(
            f"anchor {index}, a {type(model).__name__} handed over as an object, carries LoRA or another stitched model's PST "
            "already: load it anew with from_pretrained, or name its folder or Hub id"
        )
    check_placed(f"anchor {index}", model)


def check_placed(name: str, model: PreTrainedModel) -> None:
    """Refuses weights that were offloaded: they are on no device between calls, and what is trained beside them would be lost.

    Raises:
        ValueError: a part of the model is.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"device_map put a part of {name} on the CPU or on disk to be fetched at every call, which stitched models "
            "cannot do: load one size (budget=...), fewer bits (quantization_config), or the whole on one device (device_map='cpu')"
        )


def commit_of(files: Mapping[str, Path]) -> str | None:
    """The Hub commit that cached files belong to; None for a local folder."""
    return extract_commit_hash(str(next(iter(files.values()))), None) if files else None


def check_digests(name: str, index: int, recorded: Mapping[str, Any], found: Mapping[str, Mapping[str, str]]) -> None:
    """Refuses an anchor whose weights are not those the bundle was trained on.

    Args:
        recorded: how the bundle names it; one that was saved before all bytes were recorded is compared by samples.
        found: what `digests_of_files` or `digests_in_memory` gives.

    Raises:
        ValueError: a part differs; names it, with both digests.
    """
    for kind, digests in found.items():
        for part, digest in digests.items() if kind in recorded else ():
            if recorded[kind].get(part) != digest:
                raise ValueError(
                    f"anchor {index} changed: {part} of {name} has digest {digest}, the bundle was trained on "
                    f"{recorded[kind].get(part)}; load the original weights (revision), or train again"
                )
