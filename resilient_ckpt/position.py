"""Bringing the data to the saved position.

Keras' `EpochIterator` decides which batch comes when; it is left to do so. Watched here
are the iterators that it makes and how much was drawn from each; after a restart the same
draws are made again, without the data where the source can be indexed.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from keras import tree
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.trainers.data_adapters.torch_data_loader_adapter import TorchDataLoaderAdapter

from resilient_ckpt import codec, rng
from resilient_ckpt.patches import Patches
from resilient_ckpt.source_state import SourceState

logger = logging.getLogger(__name__)

_Position = Mapping[str, Any]

# The last batch that was run is read, to see that the data is the same; and one more, since
# on accelerators Keras takes batches one ahead.
_READ_BEFORE_POSITION = 2


class DataPosition:
    """Where the training data of one `fit` stands.

    Args:
        epoch_iterator: Keras' `EpochIterator` of the running `fit`.
        patches: Takes what has to be changed on it for the time of the `fit`.
    """

    def __init__(self, epoch_iterator: Any, patches: Patches) -> None:
        self._epoch_iterator = epoch_iterator
        self._adapter = epoch_iterator.data_adapter
        self._source = SourceState(_source_of(self._adapter))
        self._original: Callable[[], Iterator[Any]] = epoch_iterator._enumerate_iterator
        self._iterator: Any = None
        self._iterators = 0
        self._drawn = 0
        self._executions = 0
        self._ahead = False  # the source has given, or is giving, what is not run yet
        self._last_batch: Any = None
        self._epoch_start: dict[str, Any] = {}
        self._iterator_start: dict[str, Any] = {}
        self._first_draw: dict[str, Any] | None = None
        self._resume: tuple[_Position, int, bool] | None = None
        self._now: _Position = {}
        patches.set(epoch_iterator, "_enumerate_iterator", self._enumerate)
        self._drop_leftovers()

    @property
    def steps_per_execution(self) -> int:
        """How many batches the trainer takes at once."""
        return int(self._epoch_iterator.steps_per_execution)

    def _drop_leftovers(self) -> None:
        # To build the model, Keras has taken one batch of a PyDataset with workers; those
        # that were prefetched with it would be trained on first, besides their own epoch,
        # and how many they are is a matter of timing.
        enqueuer = getattr(self._adapter, "enqueuer", None)
        if enqueuer is not None and self._adapter.num_batches is not None:
            with enqueuer.ready_queue.mutex:
                enqueuer.ready_queue.queue.clear()

    # Watching.

    def begin_draw(self, iterator: Any) -> None:
        """To be called before batches are taken from an iterator of the trainer."""
        if iterator is not self._iterator:
            self._watch(iterator)
            self._first_draw = rng.capture()
        self._ahead = True

    def end_draw(self, batches: Sequence[Any]) -> None:
        """To be called when a step was run with the batches that were taken."""
        self._ahead = False
        self._drawn += len(batches)
        self._executions += 1
        self._last_batch = batches[-1]

    def capture(self, batches_run: int, in_epoch: bool) -> dict[str, Any]:
        """The position, between two batches.

        Args:
            batches_run: Batches of the epoch that were run.
            in_epoch: Whether batches of the epoch are still to come.

        Returns:
            JSON values.
        """
        iterator = self._epoch_iterator
        position: dict[str, Any] = {
            "num_batches": iterator._num_batches,
            "iterators": self._iterators,
            "now": {"rng": rng.capture(), "source": self._source.capture()},
            "drawn": 0,
        }
        in_use = in_epoch and batches_run > 0
        outlives_epoch = (
            iterator.steps_per_epoch is not None
            and self._iterator is not None
            and iterator._current_iterator is self._iterator
        )
        if self._drawn and (in_use or outlives_epoch):
            position.update(
                drawn=self._drawn,
                iterators=self._iterators - 1,
                executions=self._executions,
                epoch_start=self._iterator_start,
                first_draw=self._first_draw,
                fingerprint=fingerprint(self._last_batch),
                loader=None if self._ahead else self._loader_state(),
                ahead=self._ahead,
            )
        elif in_epoch:
            position["epoch_start"] = self._epoch_start
        return position

    def _watch(self, iterator: Any) -> None:
        self._iterator = iterator
        self._iterators += 1
        self._iterator_start = self._epoch_start
        self._drawn = self._executions = 0
        self._last_batch = None

    def _loader_state(self) -> Any:
        if self._source.tells_position:
            try:
                return self._source.position()
            except codec.NotEncodableError:
                return None  # It is replayed then.
        if not hasattr(self._iterator, "get_state") or not hasattr(self._iterator, "set_state"):
            return None
        try:
            return codec.encode(self._iterator.get_state())
        except codec.NotEncodableError:
            return None  # It is replayed then.

    def _enumerate(self) -> Iterator[Any]:
        if self._resume is not None:
            resume, self._resume = self._resume, None
            yield from self._enumerate_from(*resume)
            return
        self._epoch_start = {"rng": rng.capture(), "source": self._source.capture()}
        yield from self._original()

    # Resuming.

    def resume(self, position: _Position, batch: int, epoch_over: bool) -> None:
        """Makes the next epoch begin where the saved one stood.

        Args:
            position: What `capture` gave.
            batch: Batches of the epoch that were run.
            epoch_over: Whether those were all. One more round of the trainer's loop is then
                made, in which no batch is to be drawn.
        """
        self._resume = (position, batch, epoch_over)

    def _enumerate_from(
        self, position: _Position, batch: int, epoch_over: bool
    ) -> Iterator[tuple[int, int, Any]]:
        iterator = self._epoch_iterator
        per_execution = self.steps_per_execution
        drawn = int(position.get("drawn", 0))
        self._now = position.get("now", {})
        start = position.get("epoch_start") or self._now
        self._set(start)
        self._epoch_start = dict(start)
        if position.get("num_batches") is not None:
            iterator._num_batches = position["num_batches"]
        self._repeat_iterators(int(position.get("iterators", 0)))
        ahead = bool(position.get("ahead"))
        by_itself = position.get("loader") is not None
        if by_itself and self._source.tells_position:
            self._source.set_position(position["loader"])
        seek = drawn and (
            (not by_itself and not ahead) or isinstance(self._adapter, ArrayDataAdapter)
        )
        skipper = _skipper_for(self._adapter, drawn) if seek else _Skipper()
        first = True
        for begin, end, batches in self._original():
            if first:
                first = False
                skipper.begun()
                if drawn:
                    self._catch_up(batches, position, drawn, skipper)
                if (drawn or epoch_over or "epoch_start" in position) and not ahead:
                    # What the source did at the beginning of the epoch is done already.
                    # (A source that was ahead has come to its state by being read through.)
                    self._set(self._now)
            if begin + per_execution < batch or (begin < batch and not epoch_over):
                continue
            if "steps_seen" in position and begin <= batch:
                iterator._steps_seen = position["steps_seen"] + (0 if epoch_over else per_execution)
            yield begin, end, batches
        if epoch_over:
            # The source has heard of the end of this epoch twice.
            self._set(self._now)

    def _catch_up(self, batches: Any, position: _Position, drawn: int, skipper: _Skipper) -> None:
        self._watch(batches)
        if position.get("first_draw"):
            rng.restore(position["first_draw"])
            self._first_draw = position["first_draw"]
        self._drawn = drawn
        self._executions = position["executions"]
        if position.get("loader") is not None:
            if self._source.tells_position:
                return  # Its iterator begins there.
            try:
                batches.set_state(codec.decode(position["loader"]))
            except ValueError as error:  # Grain compares the source's repr, for one.
                logger.info("The data loader does not take its state, and is replayed: %s", error)
            else:
                return
        skipped = max(drawn - _READ_BEFORE_POSITION, 0)
        for _ in itertools.islice(batches, skipped):
            pass
        skipper.end()
        last = None
        for batch in itertools.islice(batches, drawn - skipped):
            last = batch
        self._last_batch = last
        expected = position.get("fingerprint")
        if last is None:
            logger.warning(
                "The training data ended before the saved position (%d batches of it); it is "
                "shorter than it was.",
                drawn,
            )
        elif expected is not None and fingerprint(last) != expected:
            logger.warning(
                "The training data is not reproducible: the last batch before the restart "
                "(number %d of its pass) came out differently. Weights, optimizer and position "
                "are restored exactly; the order or content of the data is not. Seed the source, "
                "or give it get_state() and set_state(state).",
                drawn,
            )

    def _repeat_iterators(self, count: int) -> None:
        # tf.data draws new shuffle seeds, from a state that cannot be read, for every
        # iterator that is made.
        if isinstance(self._adapter, TFDatasetAdapter):
            for _ in range(count):
                next(iter(self._adapter._dataset), None)
        self._iterators = count

    def _set(self, moment: Mapping[str, Any]) -> None:
        if moment.get("rng"):
            rng.restore(moment["rng"])
        if moment.get("source") is not None:
            self._source.restore(moment["source"])


class ValidationDraws:
    """How much of a validation generator earlier epochs have used up.

    Every other kind of validation data begins anew for each epoch.
    """

    def __init__(self) -> None:
        self.finished: list[int] = []
        self._current = 0
        self._replay: list[int] = []

    def resume(self, finished: Sequence[int]) -> None:
        """Remembers what is to be used up before the first validation."""
        self.finished = list(finished)
        self._replay = list(finished)

    def begin(self, epoch_iterator: Any) -> None:
        """To be called at the beginning of a validation.

        Args:
            epoch_iterator: Keras' `EpochIterator` over the validation data, if known.
        """
        self._current = 0
        adapter = getattr(epoch_iterator, "data_adapter", None)
        if self._replay and isinstance(adapter, GeneratorDataAdapter):
            for count in self._replay:
                for _ in itertools.islice(adapter.generator(), count):
                    pass
        self._replay = []

    def drawn(self, count: int) -> None:
        """To be called with the number of batches taken."""
        self._current += count

    def end(self) -> None:
        """To be called at the end of a validation."""
        self.finished.append(self._current)


def fingerprint(batch: Any) -> int:
    """A checksum of a batch's content.

    Args:
        batch: Nested arrays.

    Returns:
        The CRC-32 of all its arrays.
    """
    crc = 0
    for leaf in tree.flatten(batch):
        if leaf is not None:
            array = np.ascontiguousarray(leaf)
            crc = zlib.crc32(str((array.shape, array.dtype)).encode(), crc)
            crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
    return crc


class _Skipper:
    """Lets a source that is read through pass; the base of those that need not be."""

    def begun(self) -> None:
        """The trainer has made its iterator."""

    def end(self) -> None:
        """From now on batches are wanted."""


class _ArraySkipper(_Skipper):
    """Lets Keras draw the permutation, but slices nothing."""

    def __init__(self, adapter: ArrayDataAdapter) -> None:
        self._active = True
        self._patches = Patches()
        original = adapter._get_iterator

        def get_iterator(slice_batch: Callable[..., Any], inputs: Any) -> Any:
            def slice_or_skip(sliceable: Any, indices: Any = None) -> Any:
                return None if self._active else slice_batch(sliceable, indices=indices)

            return original(slice_or_skip, inputs)

        self._patches.set(adapter, "_get_iterator", get_iterator)

    def begun(self) -> None:
        self._patches.undo()

    def end(self) -> None:
        self._active = False


class _DatasetSkipper(_Skipper):
    """Lets Keras draw the order, but loads no batch."""

    def __init__(self, adapter: PyDatasetAdapter) -> None:
        self._patches = Patches()
        self._patches.set(adapter, "py_dataset", _EmptyBatches(adapter.py_dataset))

    def end(self) -> None:
        self._patches.undo()


class _EmptyBatches:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


class _EnqueuerSkipper(_Skipper):
    """Lets the first so many requests to the workers be answered without them."""

    def __init__(self, enqueuer: Any, count: int) -> None:
        self._patches = Patches()
        original = enqueuer.executor_fn
        self._patches.set(
            enqueuer, "executor_fn", lambda shared: _SkippingPool(original(shared), count)
        )

    def end(self) -> None:
        self._patches.undo()


class _SkippingPool:
    def __init__(self, pool: Any, count: int) -> None:
        self._pool = pool
        self._left = count

    def apply_async(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._left > 0:
            self._left -= 1
            return _EmptyResult()
        return self._pool.apply_async(function, arguments)

    def close(self) -> None:
        self._pool.close()


class _EmptyResult:
    def get(self) -> dict[str, Any]:
        return {}


def _skipper_for(adapter: Any, drawn: int) -> _Skipper:
    if isinstance(adapter, ArrayDataAdapter):
        return _ArraySkipper(adapter)
    if isinstance(adapter, PyDatasetAdapter):
        if adapter.enqueuer is not None:
            ready = adapter.enqueuer.ready_queue.qsize()
            return _EnqueuerSkipper(adapter.enqueuer, drawn - _READ_BEFORE_POSITION - ready)
        return _DatasetSkipper(adapter)
    return _Skipper()


def _source_of(adapter: Any) -> Any:
    if isinstance(adapter, PyDatasetAdapter):
        return adapter.py_dataset
    if isinstance(adapter, TorchDataLoaderAdapter):
        return adapter._dataloader
    return None
