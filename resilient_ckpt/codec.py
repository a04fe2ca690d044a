"""JSON for plain Python and NumPy values, without pickle.

A checkpoint may come from anywhere, and unpickling runs code. Large arrays are not put
into the text but into a list beside it.
"""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

INLINE_BYTES = 4096
_TAG = "__rc__"
_BIT_GENERATORS: dict[str, Callable[[], Any]] = {
    generator.__name__: generator
    for generator in (
        np.random.MT19937,
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.Philox,
        np.random.SFC64,
    )
}


class NotEncodableError(TypeError):
    """The value is of a type that a checkpoint cannot hold."""


def encode(value: Any, arrays: list[np.ndarray] | None = None) -> Any:
    """Turns a value into JSON.

    Args:
        value: None, bool, int, float, str, bytes, NumPy scalar or array, something with
            `__array__` (a JAX array), torch tensor, NumPy or Python random generator, or a
            list, tuple, set or dictionary of those.
        arrays: Receives the arrays of more than 4096 bytes; `None` puts them into the text.

    Returns:
        What `json.dumps` takes.

    Raises:
        NotEncodableError: If the value is of another type.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [encode(item, arrays) for item in value]
    if isinstance(value, tuple | set | frozenset):
        items = [encode(item, arrays) for item in value]
        return {_TAG: type(value).__name__, "items": items}
    if isinstance(value, dict):
        pairs = [[encode(key, arrays), encode(item, arrays)] for key, item in value.items()]
        if _TAG not in value and all(type(key) is str for key in value):
            return dict(pairs)
        return {_TAG: "dict", "pairs": pairs}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, np.random.RandomState):
        return {_TAG: "RandomState", "state": encode(value.get_state(legacy=False), arrays)}
    if isinstance(value, np.random.Generator):
        return {_TAG: "Generator", "state": encode(value.bit_generator.state, arrays)}
    if isinstance(value, random.Random):
        return {_TAG: "Random", "state": encode(value.getstate(), arrays)}
    torch = sys.modules.get("torch")  # a tensor cannot exist before its library is imported
    if torch is not None and isinstance(value, torch.Tensor):
        return {_TAG: "tensor", "array": encode(_numpy_of(value), arrays)}
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        return _encode_array(value, arrays)
    raise NotEncodableError(f"{type(value).__module__}.{type(value).__qualname__}")


def _numpy_of(tensor: Any) -> np.ndarray:
    try:
        array: np.ndarray = tensor.detach().cpu().numpy()
    except TypeError as error:  # a dtype that NumPy lacks, such as bfloat16
        raise NotEncodableError(str(error)) from error
    return array


def _encode_array(value: Any, arrays: list[np.ndarray] | None) -> Any:
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise NotEncodableError(f"array of {array.dtype}")
    if arrays is not None and array.nbytes > INLINE_BYTES:
        arrays.append(array)
        return {_TAG: "array_at", "index": len(arrays) - 1}
    return {
        _TAG: "scalar" if isinstance(value, np.generic) else "array",
        "dtype": array.dtype.name if array.dtype.kind == "V" else array.dtype.str,
        "shape": list(array.shape),
        "data": base64.b64encode(array.tobytes()).decode(),
    }


def decode(value: Any, arrays: Sequence[np.ndarray] = ()) -> Any:
    """The inverse of `encode`.

    Args:
        value: What `json.loads` gave.
        arrays: The large arrays.

    Returns:
        The value; a random generator comes back as a new one with the saved state.

    Raises:
        ValueError: If the value was not made by `encode`.
    """
    if isinstance(value, list):
        return [decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(_TAG):
        case None:
            return {key: decode(item, arrays) for key, item in value.items()}
        case "dict":
            return {decode(k, arrays): decode(v, arrays) for k, v in value["pairs"]}
        case "tuple":
            return tuple(decode(item, arrays) for item in value["items"])
        case "set":
            return {decode(item, arrays) for item in value["items"]}
        case "frozenset":
            return frozenset(decode(item, arrays) for item in value["items"])
        case "bytes":
            return base64.b64decode(value["data"])
        case "array_at":
            return np.array(arrays[value["index"]])
        case "array" | "scalar" as kind:
            raw = np.frombuffer(base64.b64decode(value["data"]), np.dtype(value["dtype"]))
            array = raw.reshape(value["shape"]).copy()
            return array[()] if kind == "scalar" else array
        case "RandomState":
            legacy = np.random.RandomState()
            legacy.set_state(decode(value["state"], arrays))
            return legacy
        case "Generator":
            state = decode(value["state"], arrays)
            bits = _BIT_GENERATORS[state["bit_generator"]]()
            bits.state = state
            return np.random.Generator(bits)
        case "Random":
            python = random.Random()
            python.setstate(decode(value["state"], arrays))
            return python
        case "tensor":
            import torch

            return torch.from_numpy(decode(value["array"], arrays))
        case other:
            raise ValueError(f"Unknown kind of value in a checkpoint: {other!r}")
