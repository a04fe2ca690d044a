"""The state that a data source keeps in itself, besides the process-wide random states."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from resilient_ckpt import codec

LARGEST_ARRAY_BYTES = 16 << 20


class SourceState:
    """Captures and restores what changes in a data source from epoch to epoch.

    A source with `get_state`/`set_state` (Grain's names) or `state_dict`/`load_state_dict`
    (torch's) is asked. Of a `PyDataset` without them, those of its own plain attributes are
    taken that have changed since the beginning of `fit`: numbers, strings, random generators,
    arrays of up to 16 MiB, such as shuffled indices. What has not changed is configuration,
    and the restarted script's to choose.

    A torch `DataLoader` is known by the states of its random generators and, where it reads
    in this process, of its dataset. torchdata's `StatefulDataLoader` also tells its position
    within an epoch (https://meta-pytorch.org/data/main/stateful_dataloader_tutorial.html).

    Args:
        source: The data source, or `None`.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._loader = _is_torch_loader(source)
        watched = source is not None and not _protocol(source) and not self._loader
        self._initial = _digests(source) if watched else {}

    def capture(self) -> Any:
        """The state, as JSON values; `None` if there is none to speak of."""
        if self._loader:
            state = {"generators": self._generator_states()}
            dataset = self._dataset()
            protocol = _protocol(dataset)
            if protocol is not None:
                state["dataset"] = getattr(dataset, protocol[0])()
            return codec.encode(state)
        protocol = _protocol(self._source)
        if protocol is not None:
            return codec.encode({"told": getattr(self._source, protocol[0])()})
        if self._source is None:
            return None
        attributes = {}
        for name, value in _attributes(self._source).items():
            digest = _digest(value)
            if digest is not None and digest != self._initial.get(name):
                attributes[name] = codec.encode(value)
        return {"attributes": attributes}

    def restore(self, state: Any) -> None:
        """Gives the source its state back.

        Args:
            state: What `capture` gave.
        """
        if not isinstance(state, Mapping):
            return
        protocol = _protocol(self._source)
        if "generators" in state and self._loader:
            self._set_generator_states(codec.decode(state["generators"]))
            dataset = self._dataset()
            protocol = _protocol(dataset)
            if "dataset" in state and protocol is not None:
                getattr(dataset, protocol[1])(codec.decode(state["dataset"]))
        elif "told" in state and protocol is not None:
            getattr(self._source, protocol[1])(codec.decode(state["told"]))
        elif "attributes" in state and self._source is not None:
            for name, value in state["attributes"].items():
                vars(self._source)[name] = codec.decode(value)

    @property
    def tells_position(self) -> bool:
        """Whether the source itself can say, and be told, where in an epoch it is."""
        return self._loader and _protocol(self._source) is not None

    def position(self) -> Any:
        """Where in the epoch the source is, as JSON values."""
        return codec.encode(self._source.state_dict())

    def set_position(self, position: Any) -> None:
        """Has the next iterator begin where `position` says."""
        self._source.load_state_dict(codec.decode(position))
        # It makes that iterator, which draws from torch's random state, only when it is
        # asked for something; the random states are put right after this.
        self._source.state_dict()

    def _dataset(self) -> Any:
        # Workers have a copy of the dataset, made anew for every epoch.
        return self._source.dataset if self._source.num_workers == 0 else None

    def _generators(self) -> dict[str, Any]:
        loader = self._source
        places = {"loader": loader, "sampler": getattr(loader, "sampler", None)}
        return {
            name: place.generator
            for name, place in places.items()
            if getattr(place, "generator", None) is not None
        }

    def _generator_states(self) -> dict[str, Any]:
        return {
            name: generator.get_state().numpy() for name, generator in self._generators().items()
        }

    def _set_generator_states(self, states: Mapping[str, Any]) -> None:
        torch = sys.modules["torch"]
        for name, generator in self._generators().items():
            if name in states:
                generator.set_state(torch.from_numpy(states[name]))


def _protocol(source: Any) -> tuple[str, str] | None:
    for pair in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if all(callable(getattr(source, name, None)) for name in pair):
            return pair
    return None


def _attributes(source: Any) -> dict[str, Any]:
    # Keras' own (workers, queue size, …) belong to this process's configuration.
    return {
        name: value
        for name, value in getattr(source, "__dict__", {}).items()
        if name not in ("_workers", "_use_multiprocessing", "_max_queue_size")
        and not (isinstance(value, np.ndarray) and value.nbytes > LARGEST_ARRAY_BYTES)
        and not (isinstance(value, list | tuple | dict | set) and len(value) > 100_000)
    }


def _digests(source: Any) -> dict[str, int | None]:
    return {name: _digest(value) for name, value in _attributes(source).items()}


def _digest(value: Any) -> int | None:
    """A checksum of a value; `None` for one that a checkpoint cannot hold."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    try:
        return zlib.crc32(json.dumps(codec.encode(value)).encode())
    except codec.NotEncodableError:
        return None


def _is_torch_loader(source: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.utils.data.DataLoader)
