"""One file of torch.save: nested dicts of tensors; only tensors and plain values are unpickled.

Owns the weights-only load, also of a member of an archive, and the stand-ins for other objects that trainers store
beside their weights. A stand-in keeps its arguments and does nothing; any other name is refused.
It knows no checkpoint.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler

from readers.archive import Place
from readers.pickles import check_old_file, check_tensor, check_zip

# Arguments and configurations, and what else Megatron-LM, NeMo, Lightning and Transformer Engine save with weights.
_STAND_IN_NAMES = """
argparse.Namespace types.SimpleNamespace typing.Any collections.defaultdict pathlib.PosixPath signal.Signals
_io.BytesIO builtins.dict builtins.list builtins.int builtins.float builtins.str builtins.bool
numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct numpy.ndarray numpy.dtype
numpy.core.multiarray.scalar numpy._core.multiarray.scalar
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
omegaconf.base.Metadata omegaconf.nodes.AnyNode omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode
omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode
megatron.enums.ModelType megatron.core.enums.ModelType megatron.model.enums.ModelType
megatron.model.enums.PositionEmbeddingType megatron.model.enums.AttnMaskType megatron.model.enums.AttnType
megatron.model.enums.LayerType megatron.core.transformer.enums.AttnMaskType
megatron.core.transformer.enums.AttnBackend megatron.core.transformer.enums.ModelType
megatron.fp16.loss_scaler.DynamicLossScaler fp16.loss_scaler.DynamicLossScaler
""".split()


_MAX_SETTINGS = 100_000
# What PyTorch raises for files that were cut off or changed.
_BROKEN = (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, AssertionError, UnicodeError)


class StandIn:
    """In the place of an object of a class that is not imported: its arguments and its state, if it has any."""

    args: tuple[Any, ...] = ()
    state: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def _stand_in(name: str) -> type[StandIn]:
    module, _, short = name.rpartition(".")
    return type(short, (StandIn,), {"__module__": module, "__qualname__": short})


# Typed as torch's safe_globals takes it: a list is invariant.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [_stand_in(name) for name in _STAND_IN_NAMES]


def load(place: Place) -> tuple[dict[str, Any], bool]:
    """`load_any` of a dict. Raises ValueError for anything else."""
    content, is_mapped = load_any(place)
    if not isinstance(content, dict):
        raise ValueError(f"{place.name}: holds {type(content).__name__}; a dict is expected")
    return content, is_mapped


def load_any(place: Place) -> tuple[Any, bool]:
    """The file's content, and whether its tensors are views of the mapped file (else they are in memory).

    Files from before PyTorch 1.6 cannot be mapped. Raises ValueError for a file that is no whole one of torch.save
    or whose pickle asks for more than tensors, plain values and stand-ins.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS), place.open() as file:
            is_mapped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            (check_zip if is_mapped else check_old_file)(file, place.name)
            if not is_mapped:
                content = torch.load(file, map_location="cpu", weights_only=True)
            elif place.is_whole:
                content = torch.load(place.path, map_location="cpu", weights_only=True, mmap=True)
            else:
                content = _load_member(place, file)
    except pickle.UnpicklingError as error:
        allowed = "a checkpoint may hold tensors and plain values only"
        raise ValueError(f"{place.name}: {refusal(error, allowed)}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{place.name}: not a complete PyTorch file ({error})") from None
    except _BROKEN as error:
        raise ValueError(f"{place.name}: not a complete PyTorch file ({first_line(error)})") from None
    return content, is_mapped


def tensors(content: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dicts, under their keys joined by dots, but for Transformer Engine's own `_extra_state`.

    Raises ValueError, with the file's `name`, for anything else that lies between them, a dict in two places too.
    """
    seen = set()

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if not isinstance(node, dict):
            raise ValueError(f"{name}: holds {type(node).__name__}; a dict of tensors is expected")
        if id(node) in seen:
            raise ValueError(f"{name}: {prefix.rstrip('.')} lies in two places")
        seen.add(id(node))
        for key, value in node.items():
            if str(key).endswith("_extra_state"):  # None or a BytesIO; a tensor since Transformer Engine 2.0
                continue
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif isinstance(value, torch.Tensor):
                check_tensor(value, f"{name}: tensor {prefix}{key!s:.200}")
                yield f"{prefix}{key}", value.detach()
            else:
                raise ValueError(f"{name}: {prefix}{key} is {type(value).__name__}; a tensor is expected")

    return walk(content, "")


def plain(value: Any) -> Any:
    """OmegaConf's stand-ins → dicts, lists and plain values. Raises ValueError for endless ones."""
    num_left = _MAX_SETTINGS

    def walk(node: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise ValueError(f"the settings have more than {_MAX_SETTINGS:,} values")
        if isinstance(node, StandIn):
            return walk(node.state["_val"] if "_val" in node.state else node.state.get("_content"))
        if isinstance(node, dict):
            return {key: walk(item) for key, item in node.items()}
        return [walk(item) for item in node] if isinstance(node, list) else node

    try:
        return walk(value)
    except RecursionError:
        raise ValueError("the settings are nested without end") from None


def _load_member(place: Place, file: Any) -> Any:
    """torch.load(mmap=True, weights_only=True) for a file inside another one, which torch.load itself cannot map."""
    reader: Any = torch._C.PyTorchFileReader(file)  # torch's stubs lack two of its methods
    if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":
        raise ValueError(f"{place.name}: its numbers are stored big-endian; only little-endian is supported")
    mapped = torch.UntypedStorage.from_file(str(place.path), False, place.path.stat().st_size)
    storages: dict[str, torch.storage.TypedStorage] = {}

    def storage(saved_id: tuple[Any, ...]) -> torch.storage.TypedStorage:
        _, storage_type, key, _location, count = saved_id
        if key not in storages:
            dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
            start = reader.get_record_offset(f"data/{key}")
            size = count * dtype.itemsize
            if not 0 <= start <= start + size <= place.size:
                raise RuntimeError(f"storage {key} ends beyond the file")
            part = mapped[place.offset + start : place.offset + start + size]
            if part.data_ptr() % dtype.itemsize:  # many a file lies inside another at any offset
                part = part.clone()
            storages[key] = torch.storage.TypedStorage(wrap_storage=part, dtype=dtype, _internal=True)
        return storages[key]

    unpickler: Any = Unpickler(io.BytesIO(reader.get_record("data.pkl")), encoding="utf-8")
    unpickler.persistent_load = storage  # replaces a method, as torch.load does
    return unpickler.load()


def refusal(error: Exception, allowed: str) -> str:
    """The objection of a weights-only load and the `allowed` content, without torch's advice to load it anyway."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"refused, because its pickle asks for {found[1]}; {allowed}"
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"not a readable PyTorch file ({reason.partition(chr(10))[0]})"


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class if there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
