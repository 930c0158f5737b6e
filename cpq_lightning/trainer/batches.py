"""Batches that callbacks read from a Lightning loop without taking them from the loop."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from cpq_lightning.trainer import private
from cpq_lightning.trainer.lightning_names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A batch, its index, and the index of its loader, as a CombinedLoader yields them.
Item: TypeAlias = tuple[Any, int, int]


class Prefetcher:
    """Reads batches ahead from the loader of a fetcher, and passes them to the loop first.

    The loader is iterated as often, and yields the same batches, as without the prefetcher: a stream that can be read
    only once loses nothing, and a sampler has the same state. An exception that ends the data while reading ahead is
    raised to the loop at the same batch. Global random numbers that the loader draws for a batch are drawn when the
    loop gets the batch, unless other code has drawn some since. For checkpoints, loaders with a ``state_dict`` report
    the state at the last batch that the loop got.

    One difference remains: if a run ends before it has trained on all batches read ahead, a stream has advanced
    further than without the prefetcher.
    """

    def __init__(self, fetcher: private.DataFetcher) -> None:
        self._loader = fetcher.combined_loader
        self._source: Iterator[Item] = iter(()) if fetcher.iterator is None else fetcher.iterator
        # The fetcher itself reads batches ahead if the data have no length.
        self._items: list[Any] = list(getattr(fetcher, "batches", ()))
        self._fetched = self._next = len(self._items)
        self._draws: list[Any] = [None] * len(self._items)
        self._states: list[Any] = []
        self._end: Exception | None = None
        # Whether batches were read ahead, and whether the loop has got any of them.
        self._ahead = self._begun = False
        self._kept: deque[Item] | None = None
        # Random states before and after the setup of the data.
        self.setup_draw: Any = None
        self._randomness: _LoaderRandomness | None = None
        fetcher.iterator = self
        private.set_loader(fetcher, self)

    @classmethod
    def of(cls, fetcher: private.DataFetcher) -> Prefetcher:
        """The prefetcher of a fetcher; a new one if it has none."""
        loader: Any = private.loader_of(fetcher)
        return loader if isinstance(loader, Prefetcher) else cls(fetcher)

    def read_ahead(self, max_batches: int, randomness: _LoaderRandomness) -> list[Item]:
        """Read up to ``max_batches`` batches that the loop will get first, including those in the fetcher's buffer.

        Args:
            max_batches: Maximal number of batches.
            randomness: The loaders' generators and workers, recorded before the setup of the data.
        """
        self._ahead = True
        randomness.follow(self._loader.flattened)
        with isolate_rng():
            self._states = self._states or [self._loader_states()]
            while len(self._items) < max_batches and self._end is None:
                before = private.collect_rng_states()
                try:
                    item = next(self._source)
                except Exception as error:
                    self._end = error
                    break
                self._items.append(item)
                self._draws.append((before, private.collect_rng_states()))
                self._states.append(self._loader_states())
        randomness.give_back()
        self._randomness = randomness
        return [item for item in self._items[:max_batches] if item[0] is not None]

    def begin(self, may_start_over: bool) -> None:
        """Prepare for the start of training, before training gets the batches that were read ahead.

        A validation loader may share a generator or persistent workers with the training loader, and may have drawn
        from them since. Then training would get other batches than those read ahead: if the data can be read again,
        training starts reading them again.
        """
        randomness, self._randomness = self._randomness, None
        if randomness is None or self._begun:
            return
        if randomness.is_untouched():
            randomness.draw()
            return
        if may_start_over and not self._fetched and _independent(self._loader) is not None:
            self.setup_draw = None
            self._clear()
            self._ahead = False
            self._source = iter(self._loader)

    def keep(self, max_batches: int) -> None:
        """Keep copies of the last ``max_batches`` batches that the loop gets, for :attr:`kept`."""
        if self._kept is None:
            self._kept = deque((copied(item) for item in self._items[: self._fetched]), max_batches)

    @property
    def kept(self) -> list[Item]:
        return list(self._kept or ())

    def states(self) -> list[Any] | None:
        """The states of stateful loaders at the loop's position; ``None`` if the loaders are at this position."""
        if not self._states or self._next >= len(self._items):
            return None
        return self._states[max(0, self._next - self._fetched)]

    def __iter__(self) -> Iterator[Item]:
        if self._ahead and not self._begun:
            # Lightning starts the data again before it takes a batch; read_training_ahead allows for that.
            self._next = 0
            return self
        self._clear()
        self._source = iter(self._loader)
        return self

    def __next__(self) -> Item:
        item = self._next_item()
        if self._kept is not None:
            self._kept.append(copied(item))
        return item

    def __len__(self) -> int:
        return len(self._loader)

    def reset(self) -> None:
        """Called by the fetcher at the end of the loop."""
        self._clear()
        self._kept = None
        self._loader.reset()

    def _next_item(self) -> Item:
        self._begun = self._begun or self._next >= self._fetched
        if self._next < len(self._items):
            item = self._items[self._next]
            _draw_again(self._draws[self._next])
            if self._begun:
                self._items[self._next] = None
            self._next += 1
            return item  # type: ignore[no-any-return]
        if self._end is not None:
            raise self._end
        return next(self._source)

    def _loader_states(self) -> list[Any]:
        states = private.loader_states(self._loader)
        try:
            return copy.deepcopy(states)
        except Exception:
            # Use a state that cannot be copied as it is, assuming that its loader does not change it in place.
            return states

    def _clear(self) -> None:
        self._items, self._draws, self._states, self._end = [], [], [], None
        self._fetched = self._next = 0


def read_training_ahead(trainer: Trainer, max_batches: int) -> list[Item] | None:
    """Read the first training batches; training still gets them.

    Args:
        trainer: A trainer whose fit has begun.
        max_batches: Maximal number of batches.

    Returns:
        The batches. There are fewer than ``max_batches`` if the data or the Trainer's limits end earlier, and none if
        ``training_step`` takes the iterator itself. ``None`` if the run has no training data.
    """
    loop = trainer.fit_loop
    randomness, before = _LoaderRandomness(_data_holders(trainer)), private.collect_rng_states()
    loop.setup_data()
    fetcher, loader = private.training_fetcher(trainer), private.training_loader(trainer)
    if loader is None or fetcher is None:
        return None
    if is_a(fetcher, "_DataLoaderIterDataFetcher"):
        return []
    setup_draw = (before, private.collect_rng_states())
    for part in loader.flattened:
        # Lightning sets the epoch later, but before the first batch; the order of a sampler may depend on it.
        private.set_sampler_epoch(part, loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
    # Lightning before 2.5.6 has no is_resuming.
    resuming = getattr(loop, "is_resuming", False)
    if trainer.current_epoch > 0 and not resuming and not loop.epoch_loop.restarting:
        # In a later fit of a Trainer, the loop starts the data again, and some loaders count the starts.
        iter(fetcher)
    prefetcher = Prefetcher.of(fetcher)
    items = prefetcher.read_ahead(_readable_batches(trainer, max_batches), randomness)
    # Without calibration, the data are set up after the sanity check, which starts with these random numbers.
    private.set_rng_states(before)
    prefetcher.setup_draw = setup_draw
    return items


def begin_training(trainer: Trainer) -> None:
    """Draw the random numbers that :func:`read_training_ahead` used to set up the data; called when training starts."""
    prefetcher = _prefetcher(trainer)
    if prefetcher is not None:
        prefetcher.begin(may_start_over=not trainer.fit_loop.epoch_loop.restarting)
        _draw_again(prefetcher.setup_draw)
        prefetcher.setup_draw = None


def _prefetcher(trainer: Trainer) -> Prefetcher | None:
    """The prefetcher of the training batches, if there is one."""
    fetcher = private.training_fetcher(trainer)
    loader: Any = None if fetcher is None else private.loader_of(fetcher)
    return loader if isinstance(loader, Prefetcher) else None


def _readable_batches(trainer: Trainer, max_batches: int) -> int:
    """The number of batches that training will certainly read, at most ``max_batches``."""
    loop = trainer.fit_loop
    limits: list[float] = [max_batches, loop.max_batches]
    if loop.epoch_loop.restarting and loop.max_batches > loop.epoch_loop.batch_progress.current.ready:
        limits.append(loop.max_batches - loop.epoch_loop.batch_progress.current.ready)
    steps = loop.max_steps - trainer.global_step
    if loop.max_steps != -1 and steps > 0:
        # With manual optimization, Lightning counts a step for each optimizer.
        automatic = trainer.lightning_module.automatic_optimization
        limits.append(
            steps * trainer.accumulate_grad_batches if automatic else -(-steps // max(1, len(trainer.optimizers)))
        )
    return int(min(limits))


def correct_loader_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Store in a checkpoint the states of stateful loaders at training's position, without the batches read ahead."""
    prefetcher = _prefetcher(trainer)
    states = None if prefetcher is None else prefetcher.states()
    if states:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states


def keep_training_batches(trainer: Trainer, max_batches: int) -> None:
    """Keep copies of the last training batches if :func:`training_batches` cannot read any without side effects."""
    fetcher, loader = private.training_fetcher(trainer), private.training_loader(trainer)
    if fetcher is None or loader is None or is_a(fetcher, "_DataLoaderIterDataFetcher"):
        return
    if _independent(loader) is None:
        Prefetcher.of(fetcher).keep(max_batches)


def training_batches(trainer: Trainer, max_batches: int) -> Iterator[Any]:
    """Yield up to ``max_batches`` batches of the training data after training, on the device, as training gets them.

    If all loaders are PyTorch's, with samplers that can be copied, the batches are those of another epoch: the data set
    is read again, and the state of no loader or sampler changes. Otherwise they are the last training batches, which
    :func:`keep_training_batches` has kept.
    """
    prefetcher, training_loader = _prefetcher(trainer), private.training_loader(trainer)
    if training_loader is None:
        return
    kept = [] if prefetcher is None else prefetcher.kept[-max_batches:]
    loader = None if kept else _independent(training_loader)
    with isolate_rng():
        for item in islice(iter(kept if loader is None else loader), max_batches):
            if item[0] is not None:
                yield on_device(trainer, copied(item))


def _independent(loader: CombinedLoader) -> CombinedLoader | None:
    """A loader of the same data whose iteration does not change the first one; ``None`` if it cannot be made."""
    memo: dict[int, Any] = {}
    copies: list[Any] = []
    for base in loader.flattened:
        dataset = getattr(base, "dataset", None)
        owner = next((cls for cls in type(base).__mro__ if "__iter__" in cls.__dict__), object)
        # A class with another __iter__ may keep its position anywhere.
        is_torch = isinstance(base, DataLoader) and owner.__module__.split(".")[0] in ("torch", "torchdata")
        if not is_torch or isinstance(dataset, IterableDataset):
            return None
        memo[id(dataset)] = dataset
        # Persistent workers belong to the original loader.
        cleared = {"_iterator": None, "next_iter_state": None, "persistent_workers": False}
        cleared["_initial_iter_for_state_dict"] = False
        try:
            copied_state = {
                name: copy.deepcopy(vars(base).get(name), memo) for name in ("sampler", "batch_sampler", "generator")
            }
        except Exception:
            return None
        copies.append(copy.copy(base))
        # Not by setattr: a DataLoader refuses another sampler.
        vars(copies[-1]).update({name: value for name, value in (cleared | copied_state).items() if name in vars(base)})
    independent = copy.copy(loader)
    independent._iterator = None
    independent.flattened = copies
    return independent


def on_device(trainer: Trainer, item: Item) -> Any:
    """A batch as a loop passes it to a step, after the transfer hooks, which may change the batch in place."""
    batch, _, dataloader_idx = item
    batch = trainer.precision_plugin.convert_input(batch)
    batch = private.before_batch_transfer(trainer, batch, dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def copied(batch: Any) -> Any:
    """A copy of a batch, which may be changed in place."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        # Tensors with an autograd graph, and objects with a file or a lock, cannot be deep-copied.
        return apply_to_collection(batch, Tensor, torch.clone)


class _LoaderRandomness:
    """The random state that loaders keep: generators of the loaders, their samplers and data sets, and persistent
    workers.

    Args:
        holders: Loaders that are about to be read, and other objects that may have generators of these loaders.
    """

    def __init__(self, holders: Sequence[Any]) -> None:
        self._loaders: Sequence[Any] = ()
        self._generators = _generators(holders)
        self._before = [_state_of(generator) for generator in self._generators]
        self._after: list[Any] = []
        self._workers: list[tuple[Any, Any]] = []

    def follow(self, loaders: Sequence[Any]) -> None:
        """Set the loaders that are read; generators that none of them has are dropped."""
        known = {id(g): state for g, state in zip(self._generators, self._before, strict=True)}
        self._loaders, self._generators = loaders, _generators(loaders)
        # A generator that is new since then has not been drawn from.
        self._before = [known.get(id(g), _state_of(g)) for g in self._generators]

    def give_back(self) -> None:
        """After reading, reset the generators and hide persistent workers, so that other iterations of the loader
        start their workers as they would without the read.
        """
        self._after = [_state_of(generator) for generator in self._generators]
        self._set(self._before)
        for loader in self._loaders:
            stays = getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is not None
            # The iterator of a StatefulDataLoader is its state.
            if stays and not hasattr(loader, "state_dict"):
                self._workers.append((loader, loader._iterator))
                loader._iterator = None

    def is_untouched(self) -> bool:
        """Whether no other code has drawn from the generators, or started the workers again, since the reset."""
        now = [_state_of(generator) for generator in self._generators]
        return _same(now, self._before) and all(loader._iterator is None for loader, _ in self._workers)

    def draw(self) -> None:
        """Set the generators to their state after reading, and restore the persistent workers."""
        self._set(self._after)
        for loader, iterator in self._workers:
            loader._iterator = iterator

    def _set(self, states: Sequence[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state


def _data_holders(trainer: Trainer) -> list[Any]:
    """What is known of the training data before their setup: the given loaders, or the objects that make them."""
    source = private.training_source(trainer)
    if source.is_module():
        makers = [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
        loaders = [value for maker in makers for value in getattr(maker, "__dict__", {}).values()]
        return [*makers, *(value for value in loaders if isinstance(value, DataLoader))]
    instance = source.instance
    return instance.flattened if isinstance(instance, CombinedLoader) else tree_leaves(instance)


def _generators(loaders: Sequence[Any]) -> list[Any]:
    """The generators of loaders and of their samplers, data sets and collate functions, without duplicates."""
    generators: dict[int, Any] = {}
    for loader in loaders:
        owners = [loader, getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)]
        samplers = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
        # Samplers may wrap samplers.
        while samplers:
            sampler = samplers.pop()
            if sampler is not None and not any(sampler is owner for owner in owners):
                owners.append(sampler)
                samplers.append(getattr(sampler, "sampler", None))
        for owner in owners:
            for value in getattr(owner, "__dict__", {}).values():
                if isinstance(value, torch.Generator | random.Random | np.random.Generator):
                    generators[id(value)] = value
    return list(generators.values())


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return copy.deepcopy(generator.bit_generator.state)


def _draw_again(draw: Any) -> None:
    """Draw the random numbers of a batch again, from each generator whose state is the same as before the batch."""
    if draw is None:
        return
    now, (before, after) = private.collect_rng_states(), draw
    drawn = {name for name in now if not _same(before[name], after[name]) and _same(now[name], before[name])}
    if drawn:
        private.set_rng_states({name: after[name] if name in drawn else value for name, value in now.items()})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    same = a == b
    return bool(same.all() if hasattr(same, "all") else same)
