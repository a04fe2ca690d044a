"""Exact resume for every kind of training data."""

from __future__ import annotations

import os
import random
import signal

import keras
import numpy as np
import pytest
from exact import Script, numbers, small_model


def arrays(**more):
    x, y = numbers()
    return lambda: {"x": x, "y": y, "batch_size": 4, **more}


VALIDATION = {"validation_data": numbers(8, seed=1), "validation_batch_size": 4}


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_arrays(tmp_path, shuffle):
    Script(small_model, arrays(shuffle=shuffle), fit=VALIDATION).assert_exact(tmp_path)


def test_jax_arrays_and_a_partial_batch(tmp_path):
    import jax.numpy as jnp

    x, y = numbers(18)
    data = lambda: {"x": jnp.asarray(x), "y": jnp.asarray(y), "batch_size": 4}  # noqa: E731
    Script(small_model, data).assert_exact(tmp_path)


def test_steps_per_execution_with_a_remainder(tmp_path):
    model = lambda: small_model(steps_per_execution=2)  # noqa: E731
    Script(model, arrays(), fit=VALIDATION).assert_exact(tmp_path)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_steps_per_epoch_over_arrays(tmp_path, steps):
    # Keras keeps one iterator over several epochs then.
    fit = {"steps_per_epoch": steps, "epochs": 4}
    Script(small_model, arrays(), fit=fit).assert_exact(tmp_path)


def test_initial_epoch(tmp_path):
    Script(small_model, arrays(), fit={"initial_epoch": 2, "epochs": 4}).assert_exact(tmp_path)


def test_sample_and_class_weights(tmp_path):
    weights = np.linspace(0, 1, 20, dtype="float32")
    Script(small_model, arrays(sample_weight=weights)).assert_exact(tmp_path, every=4)


def test_validation_split(tmp_path):
    Script(small_model, arrays(validation_split=0.2)).assert_exact(tmp_path, every=4)


LOADED: list[int] = []


class Dataset(keras.utils.PyDataset):
    """Counts what is loaded, and shuffles itself in the common way."""

    def __init__(self, shuffle: str, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = numbers()
        self.order = np.arange(20)
        self.shuffle = shuffle
        self.own = np.random.default_rng(3)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        LOADED.append(index)
        part = self.order[index * 4 : index * 4 + 4]
        return self.x[part], self.y[part]

    def on_epoch_end(self):
        if self.shuffle == "global":
            np.random.shuffle(self.order)
        elif self.shuffle == "own":
            self.own.shuffle(self.order)

    def on_epoch_begin(self):
        if self.shuffle == "begin":
            random.shuffle(self.order)


@pytest.mark.parametrize("how", ["none", "global", "own", "begin"])
def test_py_dataset(tmp_path, how):
    Script(small_model, lambda: {"x": Dataset(how)}).assert_exact(tmp_path)


# With workers, Keras trains first on what it prefetched when it built the model; with the
# callback it does not. So these compare with an undisturbed run that has the callback, too.


@pytest.mark.parametrize("how", ["none", "global", "own", "begin"])
def test_py_dataset_with_threads(tmp_path, how):
    script = Script(small_model, lambda: {"x": Dataset(how, workers=2)})
    script.assert_exact(tmp_path, every=4, bare=False)


def test_py_dataset_shuffled_by_keras(tmp_path):
    data = lambda: {"x": Dataset("none", workers=2), "shuffle": True}  # noqa: E731
    Script(small_model, data).assert_exact(tmp_path, every=4, bare=False)


def test_py_dataset_with_processes(tmp_path):
    data = lambda: {"x": Dataset("own", workers=2, use_multiprocessing=True)}  # noqa: E731
    Script(small_model, data).assert_exact(tmp_path, every=6, bare=False)


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        x = np.random.default_rng(index).normal(size=(4, 8)).astype("float32")
        return x, x[:, :1]


@pytest.mark.parametrize("workers", [1, 2])
def test_endless_py_dataset(tmp_path, workers):
    data = lambda: {"x": Endless(workers=workers)}  # noqa: E731
    fit = {"steps_per_epoch": 4}
    Script(small_model, data, fit=fit).assert_exact(tmp_path, every=3)


def test_indexable_data_is_sought_and_not_read_through(tmp_path):
    data = lambda: {"x": Dataset("own"), "shuffle": False}  # noqa: E731
    script = Script(small_model, data, fit={"epochs": 1})
    LOADED.clear()
    _, photos = script.run(tmp_path / "watched", tmp_path)
    assert LOADED[-5:] == [0, 1, 2, 3, 4]
    LOADED.clear()
    script.run(photos[4])  # Killed in batch 5: its state is that after batch 4.
    # The last two before the position are read, to compare the last with what it was.
    assert LOADED[-3:] == [2, 3, 4]
    assert 1 not in LOADED


class Stateful(Dataset):
    """Its position is known to itself alone."""

    def __init__(self):
        super().__init__("none")
        self.secret = [list(range(20))]

    def __getitem__(self, index):
        turn = self.secret[0]
        self.secret[0] = turn[4:] + turn[:4]
        return self.x[turn[:4]], self.y[turn[:4]]

    def get_state(self):
        return {"secret": self.secret}

    def set_state(self, state):
        self.secret = state["secret"]


def test_py_dataset_with_get_state(tmp_path):
    Script(small_model, lambda: {"x": Stateful()}).assert_exact(tmp_path, every=3)


def generator(seed: int = 5):
    source = np.random.default_rng(seed)
    while True:
        x = source.normal(size=(4, 8)).astype("float32")
        yield x, x.sum(axis=1, keepdims=True)


def test_endless_generator(tmp_path):
    fit = {"steps_per_epoch": 4}
    Script(small_model, lambda: {"x": generator()}, fit=fit).assert_exact(tmp_path)


def test_endless_generator_with_steps_per_execution(tmp_path):
    model = lambda: small_model(steps_per_execution=2)  # noqa: E731
    fit = {"steps_per_epoch": 4}
    Script(model, lambda: {"x": generator()}, fit=fit).assert_exact(tmp_path)


def test_generator_that_ends(tmp_path):
    import itertools

    data = lambda: {"x": (batch for batch in itertools.islice(generator(), 6))}  # noqa: E731
    Script(small_model, data, fit={"epochs": 1}).assert_exact(tmp_path)


def test_validation_generator_goes_on_where_it_was(tmp_path):
    data = lambda: {  # noqa: E731
        **arrays()(),
        "validation_data": generator(9),
        "validation_steps": 2,
    }
    Script(small_model, data).assert_exact(tmp_path, every=3)


class Unseeded(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        x = np.random.default_rng().normal(size=(4, 8)).astype("float32")
        return x, x[:, :1]


def test_data_that_is_not_reproducible_is_said_once(tmp_path, caplog):
    script = Script(small_model, lambda: {"x": Unseeded()}, fit={"epochs": 1})
    _, photos = script.run(tmp_path / "watched", tmp_path)
    script.run(photos[3])
    said = [record for record in caplog.records if "not reproducible" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["map", "iter"])
def test_grain_dataset(tmp_path, kind):
    grain = pytest.importorskip("grain")

    def data():
        x, y = numbers()
        source = [(x[i], y[i]) for i in range(20)]
        dataset = grain.MapDataset.source(source).seed(3).shuffle().batch(4)
        return {"x": dataset if kind == "map" else dataset.to_iter_dataset()}

    Script(small_model, data).assert_exact(tmp_path, every=3)


def test_grain_iterator_is_restored_and_not_read_through(tmp_path):
    grain = pytest.importorskip("grain")
    reads = []

    class Source:
        def __len__(self):
            return 40

        def __getitem__(self, index):
            reads.append(index)
            x, y = numbers(40)
            return x[index], y[index]

    def data():
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return {"x": grain.MapDataset.source(Source()).batch(4).to_iter_dataset(options)}

    script = Script(small_model, data, fit={"epochs": 1})
    _, photos = script.run(tmp_path / "watched", tmp_path)
    whole = len(reads)
    reads.clear()
    script.run(photos[8])
    assert len(reads) < whole - 20


def test_grain_data_loader(tmp_path):
    grain = pytest.importorskip("grain")

    class Source:
        def __init__(self):
            self.x, self.y = numbers()

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return self.x[index], self.y[index]

    def data():
        sampler = grain.samplers.IndexSampler(
            20, shard_options=grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=1
        )
        operations = [grain.transforms.Batch(4)]
        return {"x": grain.DataLoader(data_source=Source(), sampler=sampler, operations=operations)}

    Script(small_model, data).assert_exact(tmp_path, every=4)


@pytest.mark.parametrize("seed", [None, 4])
def test_tf_data(tmp_path, seed):
    tf = pytest.importorskip("tensorflow")

    def data():
        dataset = tf.data.Dataset.from_tensor_slices(numbers())
        return {"x": dataset.shuffle(20, seed=seed).batch(4).prefetch(2)}

    Script(small_model, data).assert_exact(tmp_path, every=3)


def test_tf_data_that_repeats(tmp_path):
    tf = pytest.importorskip("tensorflow")

    def data():
        dataset = tf.data.Dataset.from_tensor_slices(numbers())
        return {"x": dataset.shuffle(20, seed=1).repeat().batch(4)}

    fit = {"steps_per_epoch": 4}
    Script(small_model, data, fit=fit).assert_exact(tmp_path, every=3)


def torch_loader(seeded: bool, workers: int = 0):
    torch = pytest.importorskip("torch")
    x, y = numbers()
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    generator = torch.Generator().manual_seed(5) if seeded else None
    torch.manual_seed(6)
    return torch.utils.data.DataLoader(
        dataset, batch_size=4, shuffle=True, generator=generator, num_workers=workers
    )


@pytest.mark.parametrize("seeded", [True, False])
def test_torch_data_loader(tmp_path, seeded):
    data = lambda: {"x": torch_loader(seeded)}  # noqa: E731
    Script(small_model, data).assert_exact(tmp_path, every=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdata_stateful_data_loader(tmp_path, workers):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    torch = pytest.importorskip("torch")
    reads = []

    class Source(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            reads.append(index)
            x, y = numbers()
            return x[index], y[index]

    def data():
        torch.manual_seed(6)
        return {
            "x": loaders.StatefulDataLoader(
                Source(), batch_size=4, shuffle=True, num_workers=workers
            )
        }

    Script(small_model, data).assert_exact(tmp_path, every=4)
    if workers == 0:
        folder = tmp_path / "counted"
        folder.mkdir()
        reads.clear()
        _, photos = Script(small_model, data).run(tmp_path / "watched again", folder)
        whole = len(reads)
        reads.clear()
        Script(small_model, data).run(photos[-2])
        assert len(reads) < whole / 4


class Augmented(Dataset):
    """Draws from the global random state for every batch."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.random.normal(size=x.shape).astype("float32"), y


@pytest.mark.parametrize("kind", ["stateful", "augmented", "grain"])
def test_a_notice_while_a_batch_is_being_drawn(tmp_path, kind):
    """The source has given, or is giving, what is not run yet; it must give it again."""
    left = [-1]

    def drawn():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    class Source:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            drawn()
            x, y = numbers()
            return x[index], y[index]

    base = Stateful if kind == "stateful" else Augmented

    class Terminating(base):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            drawn()
            return batch

    def data():
        if kind == "grain":
            grain = pytest.importorskip("grain")
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            dataset = grain.MapDataset.source(Source()).seed(3).shuffle().batch(4)
            return {"x": dataset.to_iter_dataset(options)}
        return {"x": Terminating() if kind == "stateful" else Terminating("none")}

    script = Script(small_model, data, options={"save_freq": 100})
    undisturbed, _ = script.run(None)
    left[0] = 50 if kind == "grain" else 9
    with pytest.raises(SystemExit):
        script.run(tmp_path)
    resumed, _ = script.run(tmp_path)
    resumed.assert_equal(undisturbed)
