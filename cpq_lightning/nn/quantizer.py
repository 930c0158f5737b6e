"""The quantizer of one weight or one activation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cpq_lightning.config import CPQConfig
from cpq_lightning.functional.categorical import Estimator
from cpq_lightning.functional.dropbits import expected_bits
from cpq_lightning.functional.grid import along_channels, level_bounds
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.functional.resolution import quantize_resolution
from cpq_lightning.kernels.dispatch import QuantGrid, has_kernel
from cpq_lightning.kernels.fused import quantize
from cpq_lightning.kernels.product import Operand
from cpq_lightning.kernels.widths import quantize_widths
from cpq_lightning.nn.autograd import STEP_REACH, Connect, noise_logit, step_and_sigma
from cpq_lightning.nn.gates import Gates
from cpq_lightning.nn.observer import RangeObserver, Usage
from cpq_lightning.nn.scale_init import weight_scales
from cpq_lightning.nn.state import (
    HEADER,
    KNOWN,
    Kind,
    Settings,
    encode,
    is_stacked,
    places,
    read,
    read_members,
    size,
    weight_of_pending,
    weight_of_ranges,
)
from cpq_lightning.nn.watch import watchers

# sigma/step starts at 1/3 (RQ, arXiv 1810.01875): a cell then holds 0.64 of the mass at its centre.
_NOISE_START = 1 / 3
_LEVEL_BOUNDS = {signed: [level_bounds(k, signed) for k in range(1, 9)] for signed in (False, True)}


class Quantizer(nn.Module):
    """Quantizes a weight or an activation with a learned step and learned noise.

    ``step = start · exp(R tanh(log_scale / R))`` with ``R = log 1000``, so that any update of the parameter
    ``log_scale`` leaves it positive and finite, and a learning rate for it is a relative one; ``sigma = T · step · s``
    with ``s`` in (0.02, 1), a sigmoid of the parameter ``noise_logit``. Both are float32 and one-dimensional whatever
    happens to the model: one value, or one a channel.

    All else that defines the quantizer lies in the buffer ``state`` (:mod:`cpq_lightning.nn.state`): its settings, the
    starting steps, and fixed widths. That buffer is the truth. What a forward has to know on the host is a copy of it,
    :attr:`settings`, which follows the buffer whoever writes to it: ``copy_``, ``load_state_dict``, an averaged model.
    On a CPU the two are compared in each forward; elsewhere the buffer is read again where its version has changed, so
    that nothing is read back from the device otherwise. Change settings with :meth:`configure`.

    Args:
        kind: ``"weight"`` or ``"activation"``.
        config: The layer's settings.
        key: Which quantizer of the model this is: it keys the gates' noise.
        numel: Elements of the weight; 0 for an activation, which learns it from its first batch.
        channels: Output channels of a weight.
        channel_dim: The weight's dimension that holds them.
        exempt: Whether this is the first or last layer, at ``first_last_bits``.
        inner: The settings that the layer has where it is neither first nor last: its gates are made for them.
        device: Where the state lives.
    """

    state: Tensor
    temperature: Tensor

    def __init__(
        self,
        kind: Kind,
        config: CPQConfig | Mapping[str, Any],
        *,
        key: int = 0,
        numel: int = 0,
        channels: int = 1,
        channel_dim: int = 0,
        first_or_last: bool = False,
        inner: CPQConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        weight = kind == "weight"
        config = CPQConfig.of(config)
        bits, min_bits = _span(kind, config)
        if bits is None or min_bits is None:
            raise ValueError("act_bits=None leaves activations alone: there is no quantizer to build.")
        inner = inner or config
        widest, narrowest = _span(kind, inner)
        sharing = config.gate_sharing if weight else "tensor"
        learned = inner.learn_bits if weight else inner.learn_act_bits
        settings = Settings(
            kind=kind,
            bits=bits,
            min_bits=min_bits,
            signed=weight,
            first_or_last=first_or_last,
            estimator=config.weight_estimator if weight else config.act_estimator,
            nesting=inner.nests_by,
            range_rule=config.weight_range if weight else config.act_range,
            channels=channels if weight and config.per_channel else 1,
            channel_dim=channel_dim,
            gate_count=(widest or 0) - (narrowest or 0),
            gate_rows=channels if learned and sharing == "channel" else 1,
            gates_learned=learned,
            gate_sharing=sharing,
            gate_estimator=config.gate_estimator,
            width_count=channels if weight and config.gate_sharing == "channel" else 1,
            key=key,
            seed=config.seed % 2**64,
            numel=numel,
        )
        self._build(settings, device, config.temperature, config.keep_prob)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> Quantizer:
        """The quantizer that a part of a ``state_dict`` is of: its tensors, named as within the quantizer.

        Its ``state`` is enough for a quantizer that has learned nothing.

        Raises:
            ValueError: there is no state in it, or one that this release does not read.
        """
        if "state" not in tensors:
            raise ValueError(f"A quantizer is rebuilt from its 'state', got only {sorted(tensors)}.")
        settings, _ = read(tensors["state"])
        quantizer = cls.__new__(cls)
        nn.Module.__init__(quantizer)
        quantizer._build(settings, tensors["state"].device, 1.0, 1.0)
        quantizer.load_state_dict({**quantizer.state_dict(), **tensors})
        return quantizer

    def _build(self, settings: Settings, device: torch.device | None, temperature: float, keep_prob: float) -> None:
        self.kind = cast(Kind, settings.kind)
        self._temperature = temperature
        rows = torch.empty(settings.channels, dtype=torch.float32, device=device)
        self.log_scale = nn.Parameter(rows)
        self.noise_logit = nn.Parameter(rows.clone())
        self.gates = Gates(settings, keep_prob=keep_prob, device=device)
        self.register_buffer("temperature", torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer("state", torch.empty(size(settings), dtype=torch.float32, device=device))
        self._places = places(settings)
        self._host, self._revision = settings, 0
        # The buffer that the host's copy was read from, its version, and on a CPU its content.
        self._seen: tuple[Tensor | None, int, bytes] = (None, -1, b"")
        self._read_in_group = False
        self.fits_next = False
        self.measured: Usage | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all that was fitted and learned: every value as it is at the beginning, the range is not known."""
        self.log_scale.zero_()
        self.noise_logit.fill_(noise_logit(_NOISE_START))
        self.temperature.fill_(self._temperature)
        self.gates.initialize()
        self._host = self._host._replace(fitted=False, settled=False, pending=False, pending_signed=False)
        self.state.zero_()
        self._write_header()
        self._write_widths(torch.full((self._host.width_count,), self._host.bits))

    # State ----------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What the state says, on the host."""
        state = self._buffers["state"]
        # Traced code has no values to read: it holds what the host knew then, and is compiled anew where that changes.
        if _is_traced() or type(state) is not Tensor or state.is_meta:
            return self._host if state is None or not is_stacked(state) else read_members(state)
        seen, version, content = self._seen
        if state.device.type == "cpu":
            if seen is state and state.numpy()[:HEADER].tobytes() == content:
                return self._host
        elif seen is state and (self._version_of(state) == version or self._is_broadcast()):
            return self._host
        self._host, self._revision = read(state)
        self.gates.follow(self._host)
        self._note_read()
        self._read_in_group = _is_grouped()
        return self._host

    def _note_read(self) -> None:
        state = self.state
        # Traced or on the meta device there is nothing to compare with.
        if _is_traced() or type(state) is not Tensor or state.is_meta:
            return
        content = state.numpy()[:HEADER].tobytes() if state.device.type == "cpu" else b""
        self._seen = (state, self._version_of(state), content)

    @staticmethod
    def _version_of(state: Tensor) -> int:
        return -1 if state.is_inference() else state._version

    def _is_broadcast(self) -> bool:
        """DistributedDataParallel writes buffers anew in each step, the same values: no reason to read them back."""
        return self._read_in_group and _is_grouped() and self.training and torch.is_grad_enabled()

    def train(self, mode: bool = True) -> Quantizer:
        if mode != self.training:
            # Once in each mode the state is read whatever its version says.
            self._seen, self._read_in_group = (None, -1, b""), False
        return super().train(mode)

    def configure(self, **values: Any) -> None:
        """Change some of the :attr:`settings`.

        Raises:
            ValueError: there is no such setting.
        """
        before = self.settings
        after = before._replace(**values)
        self._host = after
        changed = any(getattr(after, name) != getattr(before, name) for name in before._fields if name not in KNOWN)
        if changed:
            widths = self.widths if after.width_count else None
            self._revision += 1
            self._write_header()
            if widths is not None:
                self._write_widths(widths)
        elif after != before:
            self._write_header()

    def take_state(self, other: Quantizer) -> None:
        """Set the state to that of another quantizer of the same shape."""
        with torch.no_grad():
            self._writable().copy_(other.state)
            self.temperature.copy_(other.temperature)
            for own, theirs in zip(self.gates.buffers(), other.gates.buffers(), strict=True):
                own.copy_(theirs)

    def _writable(self) -> Tensor:
        if self.state.is_inference() and not torch.is_inference_mode_enabled():
            self._buffers["state"] = self.state.clone()
        return self.state

    @torch.no_grad()
    def _write_header(self) -> None:
        state = self._writable()
        if not state.is_meta:
            state[:HEADER].copy_(encode(self._host, self._revision))
        self._note_read()

    @torch.no_grad()
    def _write_widths(self, widths: Tensor) -> None:
        state = self._writable()
        if not state.is_meta:
            state[self._places.widths] = widths.to(state) * state[:1]
        self._note_read()

    @torch.no_grad()
    def _write_ranges(self, scales: Tensor, width_scale: Tensor) -> None:
        """The starting steps, and those of each width over them, shape (8, 1 or channels): the range is known."""
        state = self._writable()
        if not state.is_meta:
            state[self._places.scales] = scales.to(state)
            if self._host.nesting == "resolution":
                state[self._places.width_scales] = width_scale.to(state).expand(8, self._host.channels).flatten()
        self._host = self._host._replace(fitted=True, pending=False, pending_signed=False)
        self._write_header()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}state")
        if given is not None and not given.is_meta:
            # Said before anything is overwritten.
            read(given)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.state.is_meta:
            self._seen = (None, -1, b"")
            _ = self.settings

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        known, before = self.settings, self.state
        header = None if before.is_meta else before[:HEADER].tolist()

        # A step in bfloat16 could not move by less than half a percent: devices change, no less than float32 stays.
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            halved = moved.is_floating_point() and moved.dtype.itemsize < 4
            return t.to(moved.device, torch.float32) if halved else moved

        super()._apply(keep_precision, recurse)
        if self.state.dtype != torch.float32:
            self._buffers["state"] = self.state.float()
        self._host = known
        if self.state is not before and not self.state.is_meta and self.state[:HEADER].tolist() != header:
            # Memory that to_empty has made, of which only the host knows what belongs there.
            self.reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": (None, -1, b"")}

    # What the settings say ------------------------------------------------------------------------------------------

    bits = property(lambda self: self.settings.bits, doc="The widest width.")
    min_bits = property(lambda self: self.settings.min_bits, doc="The narrowest width.")
    numel = property(lambda self: self.settings.numel, doc="Elements of the weight, or of the activation in a sample.")
    macs = property(lambda self: self.settings.macs, doc="Multiply-accumulates of the weight in one sample.")
    execution_index = property(lambda self: self.settings.execution_index, doc="Place in a forward, from 1.")
    fixed = property(lambda self: self.settings.fixed, doc="Whether widths are fixed one by one.")
    signed = property(lambda self: self.settings.signed, doc="Whether the grid holds negative levels.")
    fitted = property(lambda self: self.settings.fitted, doc="Whether the range is known.")
    settled = property(lambda self: self.settings.settled, doc="Whether it is the range of what is trained.")
    active = property(lambda self: self.settings.active, doc="Whether it quantizes.")
    first_or_last = property(lambda self: self.settings.first_or_last, doc="Whether its layer is the first or last.")
    estimator = property(lambda self: cast(Estimator, self.settings.estimator), doc="Of gradients.")
    nesting = property(lambda self: self.settings.nesting, doc="Of narrower widths.")
    range_rule = property(lambda self: self.settings.range_rule, doc="By which ranges are fitted.")
    channel_dim = property(lambda self: self._host.channel_dim, doc="Dimension of the channels.")

    @property
    def has_gates(self) -> bool:
        """Whether there is a bit that DropBits may drop."""
        return _has_gates(self.settings)

    @property
    def learns_bits(self) -> bool:
        """Whether training decides the width."""
        return self.has_gates and self.gates.learned

    @property
    def keep_prob(self) -> Tensor:
        """Probability with which a gate that is not learned is open."""
        return self.gates.keep_prob

    @property
    def noise_step(self) -> Tensor:
        """Counter that the gates' noise is drawn at."""
        return self.gates.noise_step

    @property
    def level_bounds(self) -> tuple[int, int]:
        """Lowest and highest level of the widest grid, in steps."""
        settings = self.settings
        return level_bounds(settings.bits, settings.signed)

    def range_parameters(self) -> list[nn.Parameter]:
        """The step's and the noise's parameters, without the gates'."""
        return [self.log_scale, self.noise_logit]

    # Scales and widths ----------------------------------------------------------------------------------------------

    @property
    def start_scale(self) -> Tensor:
        """Starting step of the widest grid, shape (1,) or (channels,); 1 where the range is not known."""
        return self._start() if self.settings.fitted else torch.ones_like(self.log_scale).detach()

    def _start(self) -> Tensor:
        # The arrays are those of the fit: when widths are fixed, a setting changes, and no scale.
        start = self.state[self._places.scales] / weight_of_ranges(self.state)
        if self._host.nesting == "range":
            return start
        return start * self._fitted_width_scale()[self._host.bits - 1]

    def _fitted_width_scale(self) -> Tensor:
        flat = self.state[self._places.width_scales] / weight_of_ranges(self.state)
        return flat.reshape(8, self._host.channels)

    @property
    def width_scale(self) -> Tensor:
        """Step of each width over that of the widest, shape (8, 1 or channels); before a fit, twice per bit."""
        settings = self.settings
        if not settings.fitted or settings.nesting == "range":
            return self._doubling(settings.bits)
        scales = self._fitted_width_scale()
        return scales / scales[settings.bits - 1]

    def _doubling(self, bits: int) -> Tensor:
        doubling = torch.tensor([2.0 ** (bits - k) for k in range(1, 9)], device=self.state.device)
        return doubling[:, None].expand(8, self._host.channels)

    @property
    def widths(self) -> Tensor:
        """Fixed widths, one or one a channel, int64; they count where they are fixed."""
        return (self.state[self._places.widths] / self.state[:1]).round().long()

    def step(self) -> Tensor:
        """Step of the widest grid, shape (1,) or (channels,), in the unit of what is quantized."""
        return self.start_scale * torch.exp(STEP_REACH * torch.tanh(self.log_scale / STEP_REACH))

    def _step_and_sigma(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Both, with gradients scaled by LSQ's 1/sqrt(numel · highest level) (Esser et al., ICLR 2020, section 2.2),
        over the starting step.

        The gradient in log(step) is step times that in the step. With this scale it is as large as LSQ's, and so of the
        order of the weights': a clipped global norm is not spent on steps, however small they are. Adam's update does
        not depend on it.
        """
        highest = level_bounds(settings.bits, settings.signed)[1]
        root = math.sqrt(max(1, settings.numel // settings.channels) * max(1, highest))
        return step_and_sigma(self.log_scale, self.noise_logit, self._start(), self.temperature, root)

    def decided_widths(self) -> Tensor:
        """The widths of evaluation, int64: one, or one a channel where channels have their own."""
        settings = self.settings
        if settings.fixed:
            return self.widths
        if self.learns_bits:
            return settings.min_bits + self.gates.open(settings.bits - settings.min_bits)
        return torch.full((1,), settings.bits, dtype=torch.int64, device=self.state.device)

    def expected_widths(self) -> Tensor:
        """The widths that training draws on average, likewise; the decided ones where none are learned."""
        if not self.learns_bits:
            return self.decided_widths().float()
        return expected_bits(self.gates.probabilities(self.bits - self.min_bits).detach(), self.min_bits)

    @torch.no_grad()
    def fix_widths(self, widths: Sequence[int]) -> None:
        """Fix the width, or one of each channel; nothing is dropped or learned any more.

        In evaluation the result is what it was at these widths.
        """
        top = max(widths)
        self.configure(bits=top, min_bits=min(widths), fixed=min(widths) < top)
        if min(widths) < top:
            self._write_widths(torch.as_tensor(widths))
        # What was measured belongs to the width that was.
        self.measured = None

    def nearest(self, x: Tensor) -> Tensor:
        """The grid points that evaluation puts values on, in the unit of ``x``."""
        step, codes = self._placed(x)
        return (step * codes).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """The levels that evaluation puts values on, as whole numbers in float32."""
        return self._placed(x)[1]

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The step, which broadcasts to ``x``, and the levels."""
        step, low, high = (along_channels(t, x.dim(), self.channel_dim) for t in self.grid())
        return step, torch.minimum(torch.maximum((x.float() / step).round(), low), high)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Step, lowest and highest level in evaluation, each of one value or one a channel."""
        widths = self.decided_widths()
        bounds = torch.tensor(_LEVEL_BOUNDS[self.signed], device=widths.device)[widths - 1]
        step = self.step()
        if self.nesting == "resolution":
            scale = self.width_scale.expand(-1, max(len(widths), len(step)))
            step = step * scale.gather(0, (widths - 1).expand(scale.shape[1])[None])[0]
        return step, bounds[:, 0], bounds[:, 1]

    def along_channels(self, value: Tensor, x: Tensor) -> Tensor:
        """One value a channel, shaped to broadcast to the weight."""
        return along_channels(value, x.dim(), self.channel_dim)

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``; pass it on unchanged while inactive, or while it is a weight of zeros still.

        Raises:
            RuntimeError: an activation in evaluation before its range is known.
        """
        settings = self._ready(x)
        if settings is None:
            return self._told(x, Connect.of(x, *self.parameters()))
        masks = self._masks(x, settings)
        step, sigma = self._step_and_sigma(settings)
        out = self._quantize(x, step, sigma, masks, settings)
        if masks is not None and self._gates_learn(settings) and settings.gate_estimator == "curvature":
            out = self._with_saliency(out, x, masks, step, settings)
        elif self.gates.logit is not None and not self._gates_learn(settings):
            out = Connect.of(out, self.gates.logit)
        return self._told(x, out)

    def _told(self, x: Tensor, out: Tensor) -> Tensor:
        for watcher in watchers():
            watcher.on_quantized(self, x, out)
        return out

    def operand(self, x: Tensor) -> Operand:
        """``x`` and what quantizes it where a product can do it itself, else ``x`` quantized."""
        if self._is_watched:
            return Operand(self(x))
        settings = self.settings
        gated = settings.fixed or (_has_gates(settings) and (self.training or self.gates.learned))
        if gated or not self._has_kernel(x, settings):
            return Operand(self(x))
        ready = self._ready(x)
        if ready is None:
            return Operand(self._told(x, Connect.of(x, *self.parameters())))
        step, sigma = self._step_and_sigma(ready)
        if self.gates.logit is not None:
            step = Connect.of(step, self.gates.logit)
        for watcher in watchers():
            watcher.on_quantized(self, x, None)
        return Operand(x, step, sigma, QuantGrid.of(ready.bits, ready.signed, cast(Estimator, ready.estimator)))

    def _ready(self, x: Tensor) -> Settings | None:
        """The settings, with a range to quantize ``x`` in; ``None`` where it is passed on as it is."""
        settings = self.settings
        if not settings.active or any(watcher.passes(self, x) for watcher in watchers()):
            return None
        if not settings.fitted and is_transformed():
            raise RuntimeError(
                "A quantizer's range is not known yet, and is not found within a transform of torch.func: call "
                "calibrate(model, batches) first, or the model once in training, outside of the transform. (Of a "
                "weight that holds zeros alone there is no range: leave its layer out with ignore until it does not.)"
            )
        if not settings.fitted or (not settings.settled and self._settles(x)):
            self._fit_to(x)  # type: ignore[call-arg]
            settings = self.settings
        return settings if settings.fitted else None

    def _settles(self, x: Tensor) -> bool:
        """Whether a weight that was fitted at attachment is fitted again: as training begins."""
        trains = self.kind == "weight" and self.training and torch.is_grad_enabled()
        return trains and not x.is_meta and not torch.compiler.is_compiling() and not is_transformed()

    @property
    def _is_watched(self) -> bool:
        """Whether a call of this module does more than its forward, or another one than this class has."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        own = type(self).forward is Quantizer.forward and "forward" not in self.__dict__
        return not own or any(map(bool, hooks)) or bool(_has_any_global_hook())

    def _has_kernel(self, x: Tensor, settings: Settings) -> bool:
        return (settings.channels == 1 or settings.channel_dim == 0) and has_kernel(x, settings.channels)

    def _gates_learn(self, settings: Settings) -> bool:
        """Whether a forward tells the gates anything: not those of a layer in evaluation, or of a frozen one."""
        return _has_gates(settings) and self.gates.learned and self.training and self.log_scale.requires_grad

    def _masks(self, x: Tensor, settings: Settings) -> Tensor | None:
        count = settings.bits - settings.min_bits
        if settings.fixed:
            return self.gates.fixed_masks(x, self.widths - settings.min_bits, count)
        if _has_gates(settings) and (self.training or self.gates.learned):
            # An optimizer that is toggled off, or a frozen layer, moves no step: then no gate either.
            return self.gates.masks(x, count, with_gradient=self._gates_learn(settings))
        return None

    def _with_saliency(self, out: Tensor, x: Tensor, masks: Tensor, step: Tensor, settings: Settings) -> Tensor:
        """``out``, whose backward tells the gates what their bits are worth."""
        if is_transformed():
            raise RuntimeError(
                "Learned widths are told what their bits are worth by a backward that torch.func does not run: use "
                "loss.backward() while they are learned, call the model in evaluation (model.eval()), or learn them by "
                "CPQConfig(gate_estimator='concrete')."
            )
        scales = self.width_scale[settings.min_bits - 1 : settings.bits]
        steps = step.detach() * (scales if settings.nesting == "resolution" else torch.ones_like(scales))
        return self.gates.with_saliency(
            out, x, masks, steps, settings.min_bits, settings.signed, samples=settings.kind != "weight"
        )

    def _quantize(self, x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor | None, settings: Settings) -> Tensor:
        bits, signed, estimator = settings.bits, settings.signed, cast(Estimator, settings.estimator)
        widths = range(settings.min_bits, bits + 1)
        # Which widths are drawn is read here: from a GPU, or in compiled code, that would cost more than it saves.
        readable = x.is_cpu and not torch.compiler.is_compiling()
        by_tensor = masks is not None and masks.numel() == len(masks) and settings.nesting == "resolution"
        if masks is not None and by_tensor and readable and self._has_kernel(x, settings):
            rings = [QuantGrid.of(k, signed, estimator) for k in widths]
            return quantize_widths(x, step, sigma, masks, self.width_scale[widths[0] - 1 : bits], rings)
        step, sigma = self.along_channels(step, x), self.along_channels(sigma, x)
        options: dict[str, Any] = {
            "bits": bits,
            "min_bits": settings.min_bits if masks is not None else bits,
            "signed": signed,
            "estimator": estimator,
        }
        if settings.nesting == "range" or masks is None:
            return quantize(x, step, sigma, masks, **options)
        scales = torch.stack([self.along_channels(s, x) for s in self.width_scale[widths[0] - 1 : bits]])
        return quantize_resolution(x, step, sigma, masks, scales=scales, one_width=quantize, **options)

    # Ranges ---------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _fit_to(self, x: Tensor) -> None:
        """Fit the range to what comes in a forward, where it is not known."""
        settings = self.settings
        if settings.kind == "weight":
            self.fit_weight(x, settled=self.training and torch.is_grad_enabled())
            return
        # One that calibration has seen nothing but zeros of is fitted to the first values that come.
        if not (self.training or self.fits_next or settings.settled):
            raise RuntimeError(
                "An activation quantizer was evaluated before its range is known: call calibrate(model, batches) with "
                "a few training batches first, load a checkpoint of a quantized model, or train for one step."
            )
        observer = RangeObserver()
        observer.update(x)
        observer.close_range(x.device)
        observer.update(x)
        self.fit_activation(observer)
        if self.settings.fitted and not self.training and not self.fits_next and settings.settled:
            warnings.warn(
                "Calibration has seen nothing but zeros at an activation quantizer, and an evaluation has brought "
                "other values: its range is fitted to these. Calibrate on batches like those that are evaluated.",
                stacklevel=2,
            )

    @torch.no_grad()
    def fit_weight(self, weight: Tensor, settled: bool = True) -> None:
        """Fit the starting step to a weight and forget what was learned; of zeros alone the range stays unknown.

        Args:
            weight: Full-precision weight.
            settled: Whether it is what is trained, rather than what may be initialized or loaded over yet.
        """
        settings = self.settings
        channel_dim = settings.channel_dim if settings.channels > 1 else None
        scales = weight_scales(weight, channel_dim, self.fitted_widths, settings.range_rule)
        if scales is None:
            self.configure(fitted=False, settled=settled)
            return
        self._begin(scales, settled=settled)

    @property
    def fitted_widths(self) -> list[int]:
        """Widths that need a step of their own, the widest one first."""
        settings = self.settings
        narrower = range(settings.min_bits, settings.bits) if settings.nesting == "resolution" else ()
        return [settings.bits, *narrower]

    def fit_activation(self, observer: RangeObserver) -> None:
        """Fit the starting step and the sign to what an observer has seen; of nothing seen, nothing changes, and of
        zeros alone the range stays unknown.
        """
        settings = self.settings
        if not observer.has_values:
            return
        # An audit, which knows how many samples a batch has, counts better.
        numel = settings.numel or observer.per_sample
        fitted = observer.fit(self.fitted_widths, settings.range_rule)
        if fitted is None:
            self.configure(numel=numel, fitted=False, settled=True)
            return
        self._begin(fitted[0], signed=fitted[1], numel=numel, settled=True)

    @torch.no_grad()
    def _begin(self, scales: list[Tensor], **settings: Any) -> None:
        """Start from the given steps, of each fitted width, and forget what was learned."""
        self.configure(**settings)
        width_scale = self._doubling(self._host.bits).clone()
        for k, scale in zip(self.fitted_widths, scales, strict=True):
            width_scale[k - 1] = scale / scales[0]
        self._write_ranges(scales[0], width_scale)
        self.log_scale.zero_()
        self.noise_logit.fill_(noise_logit(_NOISE_START))
        self.fits_next = False

    @torch.no_grad()
    def renew(self, scales: Sequence[Tensor], where: Tensor, signed: bool) -> None:
        """Start anew from other steps, where a range is stale; the noise that was learned stays.

        Args:
            scales: Of each of :attr:`fitted_widths`, shape (1,) or (channels,).
            where: Which of them are taken, same shape, bool.
            signed: Whether the grid holds negative levels.
        """
        self.configure(signed=signed)
        width_scale = self.width_scale.clone()
        for k, scale in zip(self.fitted_widths, scales, strict=True):
            width_scale[k - 1] = torch.where(where, scale / scales[0], width_scale[k - 1])
        self._write_ranges(torch.where(where, scales[0], self._start()), width_scale)
        self.log_scale.masked_fill_(where, 0.0)
        self.measured = None

    @torch.no_grad()
    def propose(self, scales: Sequence[Tensor], signed: bool) -> None:
        """Keep other steps, as :meth:`renew` takes them, for :meth:`accept`: what a backward computes again has those
        of its forward.
        """
        state, widths = self._writable(), self._places.pending
        for place, scale in enumerate(scales):
            state[widths.start + place] = scale
        self._host = self._host._replace(pending=True, pending_signed=signed)
        self._write_header()

    @torch.no_grad()
    def accept(self) -> bool:
        """Start anew from steps that were proposed; whether there were any."""
        settings = self.settings
        if not settings.pending:
            return False
        flat = self.state[self._places.pending] / weight_of_pending(self.state)
        scales = [flat[place : place + 1] for place in range(len(self.fitted_widths))]
        self.renew(scales, torch.ones_like(self.log_scale, dtype=torch.bool), settings.pending_signed)
        return True

    def refit_next(self) -> None:
        """Fit the range anew to the next values that come, in evaluation mode too: frozen layers train so."""
        self.configure(fitted=False, pending=False, pending_signed=False)
        self.fits_next = True

    def extra_repr(self) -> str:
        settings = self.settings
        state = "" if settings.active else ", inactive"
        width = f"{settings.min_bits}-{settings.bits}" if _has_gates(settings) else f"{settings.bits}"
        return f"{settings.kind}, bits={width}, {settings.estimator}{state}"


def _is_traced() -> bool:
    """Whether tensors stand for others here: of compiled, exported or traced code, or of ``torch.func``."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()


def _is_grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _has_gates(settings: Settings) -> bool:
    return settings.min_bits < settings.bits and not settings.fixed


def _span(kind: Kind, config: CPQConfig) -> tuple[int | None, int | None]:
    """Widest and narrowest width."""
    if kind == "weight":
        return config.weight_bits, config.narrowest_bits
    return config.act_bits, config.narrowest_act_bits
