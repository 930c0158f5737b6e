"""Batches of a Lightning loop that callbacks look at, and that the loop gets all the same."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from cpq_lightning.trainer.lightning_names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A batch, its index, and the index of its loader, as a CombinedLoader gives them.
Item: TypeAlias = tuple[Any, int, int]


class Prefetcher:
    """Stands between a loop's fetcher and its loader.

    It reads batches ahead and hands them to the loop in front of the rest, so that the loader is iterated as often, and
    gives the same, as without it: a stream that can be read once loses nothing, and a sampler's state is what it would
    be. What ends the data while it is read ahead ends it for the loop in the same place. Global random numbers that the
    loader draws for a batch are drawn when the loop gets it, where nothing else has drawn any since.
    Loaders with a ``state_dict`` have, for a checkpoint, the state of the last batch that the loop has got.

    Only a run that ends before it has trained on what was read leaves a stream further on than it would.
    """

    def __init__(self, fetcher: _DataFetcher) -> None:
        self._loader = fetcher.combined_loader
        self._source: Iterator[Item] = iter(()) if fetcher.iterator is None else fetcher.iterator
        # The fetcher itself holds batches ahead where the data have no length.
        self._items: list[Any] = list(getattr(fetcher, "batches", ()))
        self._fetched = self._next = len(self._items)
        self._draws: list[Any] = [None] * len(self._items)
        self._states: list[Any] = []
        self._end: Exception | None = None
        # Whether something was read ahead, and whether the loop has had anything of it.
        self._ahead = self._begun = False
        self._kept: deque[Item] | None = None
        # Random states before and behind the setup of the data.
        self.setup_draw: Any = None
        self._own_draw: _OwnNumbers | None = None
        fetcher.iterator = self
        fetcher._combined_loader = self  # type: ignore[assignment]

    @classmethod
    def of(cls, fetcher: _DataFetcher) -> Prefetcher:
        """The one that a fetcher has, or else a new one."""
        held: Any = fetcher._combined_loader
        return held if isinstance(held, Prefetcher) else cls(fetcher)

    def read_ahead(self, most: int, own: _OwnNumbers) -> list[Item]:
        """Up to ``most`` batches that the loop will get first, those that the fetcher holds already among them.

        Args:
            most: How many.
            own: Random numbers of the loaders' own, as they were before the data were set up.
        """
        self._ahead = True
        own.follow(self._loader.flattened)
        with isolate_rng():
            self._states = self._states or [self._loader_states()]
            while len(self._items) < most and self._end is None:
                before = _collect_rng_states()
                try:
                    item = next(self._source)
                except Exception as error:
                    self._end = error
                    break
                self._items.append(item)
                self._draws.append((before, _collect_rng_states()))
                self._states.append(self._loader_states())
        own.give_back()
        self._own_draw = own
        return [item for item in self._items[:most] if item[0] is not None]

    def begin(self, may_start_over: bool) -> None:
        """Called when training starts, with what was read ahead still to be trained on.

        A generator of the loader's own, or workers that stay, may serve a validation loader too, which has drawn from
        them since. What was read ahead is then not what training would get: where the data can be read again, training
        begins them anew.
        """
        own, self._own_draw = self._own_draw, None
        if own is None or self._begun:
            return
        if own.is_untouched():
            own.draw()
            return
        if may_start_over and not self._fetched and _independent(self._loader) is not None:
            self.setup_draw = None
            self._forget()
            self._ahead = False
            self._source = iter(self._loader)

    def keep(self, most: int) -> None:
        """Keep copies of the ``most`` batches that the loop gets last, for :attr:`kept`."""
        if self._kept is None:
            self._kept = deque((copied(item) for item in self._items[: self._fetched]), most)

    @property
    def kept(self) -> list[Item]:
        return list(self._kept or ())

    def states(self) -> list[Any] | None:
        """The states of stateful loaders where the loop is; ``None`` where the loaders themselves tell."""
        if not self._states or self._next >= len(self._items):
            return None
        return self._states[max(0, self._next - self._fetched)]

    def __iter__(self) -> Iterator[Item]:
        if self._ahead and not self._begun:
            # Lightning begins the data anew before it has taken a batch, as read_training_ahead has foreseen.
            self._next = 0
            return self
        self._forget()
        self._source = iter(self._loader)
        return self

    def __next__(self) -> Item:
        item = self._following()
        if self._kept is not None:
            self._kept.append(copied(item))
        return item

    def __len__(self) -> int:
        return len(self._loader)

    def reset(self) -> None:
        """Called by the fetcher when the loop is over."""
        self._forget()
        self._kept = None
        self._loader.reset()

    def _following(self) -> Item:
        self._begun = self._begun or self._next >= self._fetched
        if self._next < len(self._items):
            item = self._items[self._next]
            _retrace(self._draws[self._next])
            if self._begun:
                self._items[self._next] = None
            self._next += 1
            return item  # type: ignore[no-any-return]
        if self._end is not None:
            raise self._end
        return next(self._source)

    def _loader_states(self) -> list[Any]:
        states = self._loader._state_dicts()
        try:
            return copy.deepcopy(states)
        except Exception:
            # Somebody's state that cannot be copied is not changed in place, one hopes.
            return states

    def _forget(self) -> None:
        self._items, self._draws, self._states, self._end = [], [], [], None
        self._fetched = self._next = 0


def read_training_ahead(trainer: Trainer, most: int) -> list[Item] | None:
    """The first batches that training will get; it gets them all the same.

    Returns:
        Fewer where the data, or the Trainer's limits, end before: none at all where ``training_step`` takes the
        iterator itself. ``None`` where the run has no training data.
    """
    loop = trainer.fit_loop
    own, before = _OwnNumbers(_data_holders(trainer)), _collect_rng_states()
    loop.setup_data()
    fetcher = loop._data_fetcher
    if loop._combined_loader is None or fetcher is None:
        return None
    if is_a(fetcher, "_DataLoaderIterDataFetcher"):
        return []
    drawn = (before, _collect_rng_states())
    for loader in loop._combined_loader.flattened:
        # As Lightning does behind this, and before the first batch: a sampler's order may depend on it.
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
    # Lightning before 2.5.6 does not ask whether a run is resumed.
    resuming = getattr(loop, "is_resuming", False)
    if trainer.current_epoch > 0 and not resuming and not loop.epoch_loop.restarting:
        # The second fit of a Trainer: its loop is going to begin the data again, and some loaders count that.
        iter(fetcher)
    relay = Prefetcher.of(fetcher)
    items = relay.read_ahead(_limited(trainer, most), own)
    # Without this the data would be set up behind the sanity check, which begins with these random numbers.
    _set_rng_states(before)
    relay.setup_draw = drawn
    return items


def begin_training(trainer: Trainer) -> None:
    """Draw the random numbers that :func:`read_training_ahead` took to set up the data; for when training starts."""
    fetcher = trainer.fit_loop._data_fetcher
    relay: Any = None if fetcher is None else fetcher._combined_loader
    if isinstance(relay, Prefetcher):
        relay.begin(may_start_over=not trainer.fit_loop.epoch_loop.restarting)
        _retrace(relay.setup_draw)
        relay.setup_draw = None


def _limited(trainer: Trainer, most: int) -> int:
    """How many batches training is certain to read, ``most`` at most."""
    loop = trainer.fit_loop
    limits: list[float] = [most, loop.max_batches]
    if loop.epoch_loop.restarting and loop.max_batches > loop.epoch_loop.batch_progress.current.ready:
        limits.append(loop.max_batches - loop.epoch_loop.batch_progress.current.ready)
    steps = loop.max_steps - trainer.global_step
    if loop.max_steps != -1 and steps > 0:
        # Manual optimization counts a step of each optimizer.
        automatic = trainer.lightning_module.automatic_optimization
        limits.append(
            steps * trainer.accumulate_grad_batches if automatic else -(-steps // max(1, len(trainer.optimizers)))
        )
    return int(min(limits))


def correct_loader_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint say of stateful loaders where training is, not how far was read ahead of it."""
    fetcher = trainer.fit_loop._data_fetcher
    relay: Any = None if fetcher is None else fetcher._combined_loader
    states = relay.states() if isinstance(relay, Prefetcher) else None
    if states:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states


def keep_training_batches(trainer: Trainer, most: int) -> None:
    """Keep copies of the last training batches, where :func:`training_batches` could not get any without a trace."""
    loop = trainer.fit_loop
    fetcher, loader = loop._data_fetcher, loop._combined_loader
    if fetcher is None or loader is None or is_a(fetcher, "_DataLoaderIterDataFetcher"):
        return
    if _independent(loader) is None:
        Prefetcher.of(fetcher).keep(most)


def training_batches(trainer: Trainer, most: int) -> Iterator[Any]:
    """Up to ``most`` batches of the training data, on the device as training gets them; for when training is over.

    They are those of another epoch where all loaders are PyTorch's with samplers that can be copied: the data set is
    read again, and no loader or sampler moves on. Else they are the last ones of training, where
    :func:`keep_training_batches` has seen to it.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is None or loop._data_fetcher is None:
        return
    held: Any = loop._data_fetcher._combined_loader
    kept = held.kept[-most:] if isinstance(held, Prefetcher) else []
    loader = None if kept else _independent(loop._combined_loader)
    with isolate_rng():
        for item in islice(iter(kept if loader is None else loader), most):
            if item[0] is not None:
                yield on_device(trainer, copied(item))


def _independent(loader: CombinedLoader) -> CombinedLoader | None:
    """A loader of the same data that can be iterated without a trace in the first one; ``None`` where there is none."""
    memo: dict[int, Any] = {}
    copies: list[Any] = []
    for one in loader.flattened:
        dataset = getattr(one, "dataset", None)
        owner = next((cls for cls in type(one).__mro__ if "__iter__" in cls.__dict__), object)
        # Whoever iterates in a way of their own may keep count anywhere.
        torch_s = isinstance(one, DataLoader) and owner.__module__.split(".")[0] in ("torch", "torchdata")
        if not torch_s or isinstance(dataset, IterableDataset):
            return None
        memo[id(dataset)] = dataset
        # Workers that stay belong to the other loader.
        fresh = {"_iterator": None, "next_iter_state": None, "persistent_workers": False}
        fresh["_initial_iter_for_state_dict"] = False
        try:
            own = {name: copy.deepcopy(vars(one).get(name), memo) for name in ("sampler", "batch_sampler", "generator")}
        except Exception:
            return None
        copies.append(copy.copy(one))
        # Not by setattr: a loader refuses another sampler.
        vars(copies[-1]).update({name: value for name, value in (fresh | own).items() if name in vars(one)})
    independent = copy.copy(loader)
    independent._iterator = None
    independent.flattened = copies
    return independent


def on_device(trainer: Trainer, item: Item) -> Any:
    """A batch as a loop hands it to a step: through the hooks of the transfer, which may change it in place."""
    batch, _, dataloader_idx = item
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def copied(batch: Any) -> Any:
    """A copy that may be changed in place."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        # Tensors with a graph behind them, and objects that hold a file or a lock.
        return apply_to_collection(batch, Tensor, torch.clone)


class _OwnNumbers:
    """Random numbers of some loaders' own: generators that they, their samplers or data sets hold; and workers that
    stay.

    Args:
        holders: Loaders that something is about to be read from, and what may hold generators of theirs.
    """

    def __init__(self, holders: Sequence[Any]) -> None:
        self._loaders: Sequence[Any] = ()
        self._generators = _generators(holders)
        self._before = [_state_of(generator) for generator in self._generators]
        self._after: list[Any] = []
        self._workers: list[tuple[Any, Any]] = []

    def follow(self, loaders: Sequence[Any]) -> None:
        """The loaders that it is: of generators that none of them holds nothing is asked any more."""
        known = {id(g): state for g, state in zip(self._generators, self._before, strict=True)}
        self._loaders, self._generators = loaders, _generators(loaders)
        # One that has just been made is where it was.
        self._before = [known.get(id(g), _state_of(g)) for g in self._generators]

    def give_back(self) -> None:
        """Set the generators to where they were, once it has been read, and hide the workers that stay: who else
        iterates the loader starts workers of its own, as it would.
        """
        self._after = [_state_of(generator) for generator in self._generators]
        self._set(self._before)
        for loader in self._loaders:
            stays = getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is not None
            # A StatefulDataLoader's iterator is its state.
            if stays and not hasattr(loader, "state_dict"):
                self._workers.append((loader, loader._iterator))
                loader._iterator = None

    def is_untouched(self) -> bool:
        """Whether nobody has drawn from the generators, nor read from the workers, since."""
        now = [_state_of(generator) for generator in self._generators]
        return _same(now, self._before) and all(loader._iterator is None for loader, _ in self._workers)

    def draw(self) -> None:
        """Set the generators to where reading had taken them, and give the workers back."""
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
    """What is known of the training data before they are set up: loaders that were given, or who makes them."""
    source = trainer.fit_loop._data_source
    if source.is_module():
        makers = [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
        loaders = [value for maker in makers for value in getattr(maker, "__dict__", {}).values()]
        return [*makers, *(value for value in loaders if isinstance(value, DataLoader))]
    given = source.instance
    return given.flattened if isinstance(given, CombinedLoader) else tree_leaves(given)


def _generators(loaders: Sequence[Any]) -> list[Any]:
    """Generators that loaders hold, or their samplers, data sets and collate functions; each once."""
    found: dict[int, Any] = {}
    for loader in loaders:
        holders = [loader, getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)]
        samplers = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
        # Samplers around samplers.
        while samplers:
            sampler = samplers.pop()
            if sampler is not None and not any(sampler is holder for holder in holders):
                holders.append(sampler)
                samplers.append(getattr(sampler, "sampler", None))
        for holder in holders:
            for value in getattr(holder, "__dict__", {}).values():
                if isinstance(value, torch.Generator | random.Random | np.random.Generator):
                    found[id(value)] = value
    return list(found.values())


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return copy.deepcopy(generator.bit_generator.state)


def _retrace(draw: Any) -> None:
    """Draw the random numbers that a batch took, from each generator that is where it was."""
    if draw is None:
        return
    now, (before, after) = _collect_rng_states(), draw
    drawn = {name for name in now if not _same(before[name], after[name]) and _same(now[name], before[name])}
    if drawn:
        _set_rng_states({name: after[name] if name in drawn else value for name, value in now.items()})


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    same = one == other
    return bool(same.all() if hasattr(same, "all") else same)
