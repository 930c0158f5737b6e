"""The quantizer of one weight or one activation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cpq_lightning.config import CPQConfig
from cpq_lightning.functional.categorical import Estimator
from cpq_lightning.functional.dropbits import expected_bits
from cpq_lightning.functional.grid import (
    along_channels,
    doubled,
    half_step,
    narrower_zero_point,
    nearest_level,
)
from cpq_lightning.functional.grid_fit import GridFit
from cpq_lightning.functional.groups import from_groups, group_count, is_view, scale_of_each, to_groups
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.functional.resolution import quantize_resolution
from cpq_lightning.kernels.dispatch import Choice, QuantGrid, choose, has_kernel
from cpq_lightning.kernels.fused import quantize
from cpq_lightning.kernels.product import Operand
from cpq_lightning.kernels.widths import quantize_widths
from cpq_lightning.nn.autograd import SCALE_REACH, Connect, noise_logit, scale_and_sigma
from cpq_lightning.nn.gates import Gates
from cpq_lightning.nn.observer import RangeObserver, Usage
from cpq_lightning.nn.scale_init import WeightRows, balanced_widths, fit_rows, weight_rows
from cpq_lightning.nn.state import (
    HEADER,
    KNOWN,
    SIGNED,
    UNSIGNED,
    Kind,
    Settings,
    encode,
    is_stacked,
    places,
    read,
    read_members,
    size,
    upgraded,
    weight_of_pending,
    weight_of_ranges,
)
from cpq_lightning.nn.watch import watchers

# sigma/scale starts at 1/3 (RQ, arXiv 1810.01875): a value on a level then keeps it with probability 0.64.
_INITIAL_NOISE = 1 / 3


class Quantizer(nn.Module):
    """Quantizes a weight or an activation with a learned scale and learned noise.

    The scale (the papers' step size) is ``scale = start · exp(R tanh(log_scale / R))`` with ``R = log 1000``. Any
    update of the parameter ``log_scale`` thus keeps it positive and finite, and the learning rate acts on its
    logarithm. The noise is ``sigma = T · scale · s`` with ``s`` in (0.02, 1), a sigmoid of the parameter
    ``noise_logit``. Both parameters stay float32 and one-dimensional, with one value or one for each channel.

    All other state lies in the buffer ``state`` (:mod:`cpq_lightning.nn.state`): the settings, the initial scales, and
    fixed widths. :attr:`settings` is its copy on the host, and follows any write to the buffer: by ``copy_``,
    ``load_state_dict`` or model averaging. On a CPU the two are compared in each forward. On other devices the buffer
    is read only after its version has changed, to avoid copies from the device. Change settings with :meth:`configure`.

    Args:
        kind: ``"weight"`` or ``"activation"``.
        config: The settings of the layer.
        key: Index of the quantizer in the model, which keys the gates' noise.
        numel: Elements of the weight; 0 for an activation, for which the first batch determines the number.
        channels: Output channels of a weight.
        channel_dim: The weight's dimension of output channels.
        inputs: Input features of a linear layer's weight, of shape (channels, inputs), which ``config.group_size``
            divides into groups; 0 for any other weight, which has no groups.
        first_or_last: Whether the layer is the first or last one, at ``first_last_bits``.
        inner: The settings that the layer would have as neither first nor last; gates are created for these.
        device: Device of the state.
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
        inputs: int = 0,
        first_or_last: bool = False,
        inner: CPQConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        weight = kind == "weight"
        config = CPQConfig.of(config)
        bits, min_bits = _span(kind, config)
        if bits is None or min_bits is None:
            raise ValueError("act_bits=None does not quantize activations: there is no quantizer to build.")
        inner = inner or config
        widest, narrowest = _span(kind, inner)
        sharing = config.gate_sharing if weight else "tensor"
        learned = inner.learn_bits if weight else inner.learn_act_bits
        # A row that one group holds has one scale, like any channel.
        size = config.group_size if weight and config.group_size and channels and inputs > config.group_size else 0
        scales = channels * group_count(inputs, size) if size else channels
        settings = Settings(
            kind=kind,
            bits=bits,
            min_bits=min_bits,
            grid=config.weight_grid if weight else config.chosen_act_grid,
            doubled_zero_points=SIGNED if weight else UNSIGNED,
            first_or_last=first_or_last,
            estimator=config.weight_estimator if weight else config.act_estimator,
            nesting=inner.nests_by,
            range_rule=config.weight_range if weight else config.act_range,
            group_size=size,
            # A weight without elements, which has no channel, has a scale too.
            channels=max(1, scales) if weight and config.per_channel else 1,
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
        """Rebuild a quantizer from its part of a ``state_dict``, with the names relative to the quantizer.

        ``state`` alone is enough for a quantizer that has not been trained.

        Raises:
            ValueError: ``state`` is missing, or this release cannot read it.
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
        # The buffer that the copy on the host was read from, its version, and on a CPU its content.
        self._seen: tuple[Tensor | None, int, bytes] = (None, -1, b"")
        self._read_in_group = False
        self.fits_next = False
        self.measured: Usage | None = None
        # Share of a weight's elements that oscillate, where OscillationMonitor has measured it.
        self.oscillating: float | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set every value to its initial one: the range becomes unknown, and all training is lost."""
        self.log_scale.zero_()
        self.noise_logit.fill_(noise_logit(_INITIAL_NOISE))
        self.temperature.fill_(self._temperature)
        self.gates.initialize()
        self._host = self._host._replace(fitted=False, settled=False, pending=False, pending_zero_points=UNSIGNED)
        self.state.zero_()
        self._write_header()
        self._write_widths(torch.full((self._host.width_count,), self._host.bits))

    # State ----------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in ``state``, as a copy on the host."""
        state = self._buffers["state"]
        # Traced code cannot read values: it uses the copy on the host, and is recompiled when that changes.
        if _is_traced() or type(state) is not Tensor or state.is_meta:
            return self._host if state is None or not is_stacked(state) else read_members(state)
        buffer, version, content = self._seen
        if state.device.type == "cpu":
            if buffer is state and state.numpy()[:HEADER].tobytes() == content:
                return self._host
        elif buffer is state and (self._version_of(state) == version or self._is_broadcast()):
            return self._host
        self._host, self._revision = read(state)
        self.gates.follow(self._host)
        self._note_read()
        self._read_in_group = _is_distributed()
        return self._host

    def _note_read(self) -> None:
        state = self.state
        # Traced code and the meta device have no content to compare.
        if _is_traced() or type(state) is not Tensor or state.is_meta:
            return
        content = state.numpy()[:HEADER].tobytes() if state.device.type == "cpu" else b""
        self._seen = (state, self._version_of(state), content)

    @staticmethod
    def _version_of(state: Tensor) -> int:
        return -1 if state.is_inference() else state._version

    def _is_broadcast(self) -> bool:
        """Whether DistributedDataParallel broadcasts buffers in each step, unchanged, so that no read is needed."""
        return self._read_in_group and _is_distributed() and self.training and torch.is_grad_enabled()

    def train(self, mode: bool = True) -> Quantizer:
        if mode != self.training:
            # Each change of mode reads the state once, regardless of its version.
            self._seen, self._read_in_group = (None, -1, b""), False
        return super().train(mode)

    def configure(self, **values: Any) -> None:
        """Change some of the :attr:`settings`.

        Raises:
            ValueError: A setting does not exist.
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
        """Copy the state of another quantizer with tensors of the same shapes."""
        with torch.no_grad():
            self._writable().copy_(other.state)
            self.temperature.copy_(other.temperature)
            for buffer, source in zip(self.gates.buffers(), other.gates.buffers(), strict=True):
                buffer.copy_(source)

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
        """Write the initial scales, and the scale of each width relative to them, shape (8, 1 or channels)."""
        state = self._writable()
        if not state.is_meta:
            state[self._places.scales] = scales.to(state)
            if self._host.nesting == "resolution":
                state[self._places.width_scales] = width_scale.to(state).expand(8, self._host.channels).flatten()
        self._host = self._host._replace(fitted=True, pending=False, pending_zero_points=UNSIGNED)
        self._write_header()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}state")
        if loaded is not None and not loaded.is_meta:
            # Raises for an invalid state before anything is overwritten.
            state_dict = {**state_dict, f"{prefix}state": upgraded(loaded)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.state.is_meta:
            self._seen = (None, -1, b"")
            _ = self.settings

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        known, before = self.settings, self.state
        header = None if before.is_meta else before[:HEADER].tolist()

        # Move devices but keep float32: a scale in bfloat16 could not change by less than half a percent.
        def keep_precision(t: Tensor) -> Tensor:
            result = fn(t)
            reduced = result.is_floating_point() and result.dtype.itemsize < 4
            return t.to(result.device, torch.float32) if reduced else result

        super()._apply(keep_precision, recurse)
        if self.state.dtype != torch.float32:
            self._buffers["state"] = self.state.float()
        self._host = known
        if self.state is not before and not self.state.is_meta and self.state[:HEADER].tolist() != header:
            # to_empty allocates uninitialized memory, and only the host knows the settings.
            self.reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": (None, -1, b"")}

    # Settings -------------------------------------------------------------------------------------------------------

    bits = property(lambda self: self.settings.bits, doc="The widest width.")
    min_bits = property(lambda self: self.settings.min_bits, doc="The narrowest width.")
    numel = property(lambda self: self.settings.numel, doc="Elements of the weight, or of the activation in a sample.")
    macs = property(lambda self: self.settings.macs, doc="Multiply-accumulates of the weight in one sample.")
    execution_index = property(lambda self: self.settings.execution_index, doc="Index in execution order, from 1.")
    fixed = property(lambda self: self.settings.fixed, doc="Whether widths are fixed one by one.")
    signed = property(lambda self: self.settings.bounds[0] < 0, doc="Whether the widest grid has negative levels.")
    zero_point = property(
        lambda self: self.settings.zero_point(self.settings.bits), doc="Zero point of the widest grid."
    )
    fitted = property(lambda self: self.settings.fitted, doc="Whether the range is known.")
    settled = property(lambda self: self.settings.settled, doc="Whether the range was fitted to the trained tensor.")
    active = property(lambda self: self.settings.active, doc="Whether the quantizer is active.")
    first_or_last = property(lambda self: self.settings.first_or_last, doc="Whether its layer is the first or last.")
    estimator = property(lambda self: cast(Estimator, self.settings.estimator), doc="Gradient estimator.")
    nesting = property(lambda self: self.settings.nesting, doc="How narrower grids nest.")
    range_rule = property(lambda self: self.settings.range_rule, doc="Rule of the scale initialization.")
    channel_dim = property(lambda self: self._host.channel_dim, doc="Dimension of the channels.")

    @property
    def has_gates(self) -> bool:
        """Whether DropBits has bits to drop."""
        return _has_gates(self.settings)

    @property
    def learns_bits(self) -> bool:
        """Whether the width is learned."""
        return self.has_gates and self.gates.learned

    @property
    def keep_prob(self) -> Tensor:
        """Probability of an open gate if gates are not learned."""
        return self.gates.keep_prob

    @property
    def noise_step(self) -> Tensor:
        """Counter of the gates' noise."""
        return self.gates.noise_step

    @property
    def level_bounds(self) -> tuple[float, float]:
        """Lowest and highest level of the widest grid."""
        return self.settings.bounds

    def range_parameters(self) -> list[nn.Parameter]:
        """The parameters of scale and noise, without those of the gates."""
        return [self.log_scale, self.noise_logit]

    # Scales and widths ----------------------------------------------------------------------------------------------

    @property
    def start_scale(self) -> Tensor:
        """Initial scale of the widest grid, shape (1,), (channels,) or (groups,); 1 before the range is known."""
        return self._start() if self.settings.fitted else torch.ones_like(self.log_scale).detach()

    def _start(self) -> Tensor:
        # The stored scales belong to the widths at the fit; fix_widths changes settings only.
        start = self.state[self._places.scales] / weight_of_ranges(self.state)
        if self._host.nesting == "range":
            return start
        return start * self._fitted_width_scale()[self._host.bits - 1]

    def _fitted_width_scale(self) -> Tensor:
        flat = self.state[self._places.width_scales] / weight_of_ranges(self.state)
        return flat.reshape(8, self._host.channels)

    @property
    def width_scale(self) -> Tensor:
        """Scale of each width divided by that of the widest, shape (8, 1 or channels).

        Before a fit it doubles with each bit less.
        """
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
        """Fixed widths, one or one for each channel, int64; in use only if ``fixed``."""
        return (self.state[self._places.widths] / self.state[:1]).round().long()

    def scale(self) -> Tensor:
        """Scale of the widest grid, shape (1,), (channels,) or (groups,), in the unit of the quantized tensor."""
        return self.start_scale * torch.exp(SCALE_REACH * torch.tanh(self.log_scale / SCALE_REACH))

    def _scale_and_sigma(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """The scale and sigma. Their gradients are multiplied by LSQ's gradient scale 1/sqrt(numel · highest level)
        (Esser et al., ICLR 2020, section 2.2) and divided by the initial scale.

        The gradient in log(scale) is the scale times that in the scale. With this factor it is as large as LSQ's, and
        of the order of the weights' gradients, so that small scales do not dominate a clipped global norm. Adam's
        update does not depend on it.
        """
        highest = max(1, round(settings.bounds[1]))
        size = max(1, settings.numel // settings.channels) * highest
        return scale_and_sigma(self.log_scale, self.noise_logit, self._start(), self.temperature, size)

    def decided_widths(self) -> Tensor:
        """The widths in evaluation, int64: one, or one for each channel."""
        settings = self.settings
        if settings.fixed:
            return self.widths
        if self.learns_bits:
            return settings.min_bits + self.gates.open(settings.bits - settings.min_bits)
        return torch.full((1,), settings.bits, dtype=torch.int64, device=self.state.device)

    def expected_widths(self) -> Tensor:
        """The expected widths in training, one or one for each channel; the decided widths if none is learned."""
        if not self.learns_bits:
            return self.decided_widths().float()
        return expected_bits(self.gates.probabilities(self.bits - self.min_bits).detach(), self.min_bits)

    @torch.no_grad()
    def fix_widths(self, widths: Sequence[int]) -> None:
        """Fix the width, or one width for each channel; from then on no bit is dropped and no width is learned.

        In evaluation the result is the same as before at these widths.
        """
        widest = max(widths)
        self.configure(bits=widest, min_bits=min(widths), fixed=min(widths) < widest)
        if min(widths) < widest:
            self._write_widths(torch.as_tensor(widths))
        # The measurement belongs to the previous width.
        self.measured = None

    @torch.no_grad()
    def set_width(self, bits: int) -> None:
        """Give a quantizer without gates another width, on the same range until it is fitted again."""
        settings = self.settings
        zero_points, before = list(settings.doubled_zero_points), settings.zero_point(settings.bits)
        ratio = 2.0 ** (settings.bits - bits)
        if not half_step(before):
            zero_points[bits - 1] = doubled(min(round(before / ratio), 2**bits - 1))
        fit = GridFit(self.scale() * ratio, zero_points[bits - 1] / 2)
        if half_step(fit.zero_point) and bits > 7:
            fit = fit._replace(zero_point=2 ** (bits - 1))
        self.configure(bits=bits, min_bits=bits)
        if settings.fitted:
            self.renew([fit], torch.ones_like(self.log_scale, dtype=torch.bool))
        self.measured = None

    def nearest(self, x: Tensor) -> Tensor:
        """``x`` quantized as in evaluation: the nearest grid points, in the unit of ``x``."""
        scale, codes = self._scale_and_levels(x)
        return (scale * codes).to(x.dtype)

    def levels(self, x: Tensor) -> Tensor:
        """The levels of ``x`` in evaluation, in units of :meth:`grid`'s scale: whole numbers or, on a balanced grid,
        half-integers, in float32.
        """
        return self._scale_and_levels(x)[1]

    def _scale_and_levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale, broadcastable to ``x``, and the levels."""
        scale, low, high = (self.along_channels(t, x) for t in self.grid())
        return scale, nearest_level(x.float() / scale, low, high)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, lowest and highest level in evaluation, each with one value or one for each channel; of groups, the
        scale has one for each.
        """
        widths = self.decided_widths()
        zero_points = torch.tensor(self.settings.doubled_zero_points, device=widths.device)[widths - 1] / 2
        scale = self.scale()
        if self.nesting == "resolution":
            width_scale = self.width_scale.expand(-1, max(len(widths), len(scale)))
            scale = scale * width_scale.gather(0, (widths - 1).expand(width_scale.shape[1])[None])[0]
        return scale, -zero_points, 2.0**widths - 1 - zero_points

    def codes_per_level(self) -> Tensor:
        """The factor that makes levels integers: 2 for a balanced grid, else 1; one value, or one for each channel."""
        factor = 1 + 2 * (self.grid()[1] % 1)
        return factor[:1] if bool((factor == factor[0]).all()) else factor

    def along_channels(self, value: Tensor, x: Tensor) -> Tensor:
        """One value, or one for each channel or group, in a shape that broadcasts to the weight."""
        return scale_of_each(value, x.shape, self.channel_dim, self._host.group_size)

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``; return it unchanged while inactive, or as long as all values of a weight are zero.

        Raises:
            RuntimeError: An activation is evaluated before its range is known.
        """
        settings = self._ready(x)
        if settings is None:
            return self._notify_watchers(x, Connect.of(x, *self.parameters()))
        rows = self._rows(x, settings)
        masks = self._masks(rows, settings)
        scale, sigma = self._scale_and_sigma(settings)
        out = self._quantize(rows, scale, sigma, masks, settings)
        if masks is not None and self._gates_learn(settings) and settings.gate_estimator == "curvature":
            out = self._with_saliency(out, rows, masks, scale, settings, outputs=len(x) if x.dim() else 1)
        elif self.gates.logit is not None and not self._gates_learn(settings):
            out = Connect.of(out, self.gates.logit)
        return self._notify_watchers(x, from_groups(out, x.shape[1]) if settings.group_size else out)

    def _rows(self, x: Tensor, settings: Settings) -> Tensor:
        """``x``, or its matrix of groups: the tensor in which each scale belongs to a channel."""
        return to_groups(x, settings.group_size) if settings.group_size else x

    def _notify_watchers(self, x: Tensor, out: Tensor) -> Tensor:
        for watcher in watchers():
            watcher.on_quantized(self, x, out)
        return out

    def operand(self, x: Tensor) -> Operand:
        """``x`` with its scale and grid if the kernel of a product can quantize it, else ``x`` quantized."""
        if self._has_hooks:
            return Operand(self(x))
        settings = self.settings
        # The product takes groups only as parts of the weight's own memory.
        grouped = settings.group_size > 0 and not is_view(x, settings.group_size)
        if grouped or self._is_masked(settings) or not self._has_kernel(self._rows(x, settings), settings):
            return Operand(self(x))
        ready = self._ready(x)
        if ready is None:
            return Operand(self._notify_watchers(x, Connect.of(x, *self.parameters())))
        scale, sigma = self._scale_and_sigma(ready)
        if self.gates.logit is not None:
            scale = Connect.of(scale, self.gates.logit)
        for watcher in watchers():
            watcher.on_quantized(self, x, None)
        return Operand(x, scale, sigma, _quant_grid(ready, ready.bits))

    def _ready(self, x: Tensor) -> Settings | None:
        """The settings, after a fit of the range where needed; ``None`` if ``x`` is not quantized."""
        settings = self.settings
        if not settings.active or any(watcher.passes(self, x) for watcher in watchers()):
            return None
        if not settings.fitted and is_transformed():
            raise RuntimeError(
                "A quantizer's range is not known yet, and cannot be fitted within a transform of torch.func: call "
                "calibrate(model, batches) first, or the model once in training, outside of the transform. (A weight "
                "of zeros only has no range: leave its layer out with ignore while all its values are zero.)"
            )
        if not settings.fitted or (not settings.settled and self._settles(x)):
            self._fit_to(x)  # type: ignore[call-arg]
            settings = self.settings
        return settings if settings.fitted else None

    def _settles(self, x: Tensor) -> bool:
        """Whether to fit a weight again that was fitted when it was attached: in the first training forward."""
        trains = self.kind == "weight" and self.training and torch.is_grad_enabled()
        return trains and not x.is_meta and not torch.compiler.is_compiling() and not is_transformed()

    @property
    def _has_hooks(self) -> bool:
        """Whether a call runs hooks, or a forward other than that of this class."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        default_forward = type(self).forward is Quantizer.forward and "forward" not in self.__dict__
        return not default_forward or any(map(bool, hooks)) or bool(_has_any_global_hook())

    def implementation(self, x: Tensor, device: str | None = None) -> Choice:
        """The implementation that a forward on a tensor like ``x`` runs, and the reasons against the others.

        Nothing is computed. Where DropBits draws gates, the answer is that for a draw that drops a bit.

        Args:
            x: A tensor of the dtype, shape and strides in question; on the meta device if ``device`` is given.
            device: Type of the device in question, such as ``"cuda"``; ``None`` means that of ``x``.
        """
        settings = self.settings
        # With nesting by resolution, each width is quantized without masks.
        masked = self._is_masked(settings) and settings.nesting == "range"
        rows = self._rows(x, settings)
        return choose(rows, settings.channels, settings.channel_dim, masked, settings.estimator, device)

    def _has_kernel(self, x: Tensor, settings: Settings) -> bool:
        return has_kernel(x, settings.channels, settings.channel_dim, estimator=settings.estimator)

    def _is_masked(self, settings: Settings) -> bool:
        """Whether a forward has masks of the bits."""
        return settings.fixed or (_has_gates(settings) and (self.training or self.gates.learned))

    def _gates_learn(self, settings: Settings) -> bool:
        """Whether a forward gives the gates a gradient: not in evaluation, and not in a frozen layer."""
        return _has_gates(settings) and self.gates.learned and self.training and self.log_scale.requires_grad

    def _masks(self, x: Tensor, settings: Settings) -> Tensor | None:
        if not self._is_masked(settings):
            return None
        count = settings.bits - settings.min_bits
        if settings.fixed:
            return self.gates.fixed_masks(x, self.widths - settings.min_bits, count)
        # If the optimizer is toggled off or the layer is frozen, neither the scale nor the gates are trained.
        return self.gates.masks(x, count, with_gradient=self._gates_learn(settings))

    def _with_saliency(
        self, out: Tensor, x: Tensor, masks: Tensor, scale: Tensor, settings: Settings, outputs: int
    ) -> Tensor:
        """``out``, with a backward pass that gives the gates the saliency of their bits."""
        if is_transformed():
            raise RuntimeError(
                "Learned widths get the saliency of their bits from a backward pass that torch.func does not run: use "
                "loss.backward() while they are learned, call the model in evaluation (model.eval()), or learn them "
                "with CPQConfig(gate_estimator='concrete')."
            )
        width_scales = self.width_scale[settings.min_bits - 1 : settings.bits]
        zero_points = settings.doubled_zero_points[settings.min_bits - 1 : settings.bits]
        scales = scale.detach() * (width_scales if settings.nesting == "resolution" else torch.ones_like(width_scales))
        shape = out.shape
        if settings.group_size:
            # Saliency adds up within an output, over all its groups.
            by_output = (outputs, len(x) // outputs, settings.group_size)
            out, x, scales = out.reshape(by_output), x.reshape(by_output), scales.reshape(len(scales), *by_output[:2])
        salient = self.gates.with_saliency(
            out, x, masks, scales, settings.min_bits, zero_points, samples=settings.kind != "weight"
        )
        return salient.reshape(shape) if settings.group_size else salient

    def _quantize(self, x: Tensor, scale: Tensor, sigma: Tensor, masks: Tensor | None, settings: Settings) -> Tensor:
        bits, estimator = settings.bits, cast(Estimator, settings.estimator)
        widths = range(settings.min_bits, bits + 1)
        # The sampled widths are read on the host; on a GPU or in compiled code that costs more than it saves.
        readable = x.is_cpu and not torch.compiler.is_compiling()
        by_tensor = masks is not None and masks.numel() == len(masks) and settings.nesting == "resolution"
        if masks is not None and by_tensor and readable and self._has_kernel(x, settings):
            grids = [_quant_grid(settings, k) for k in widths]
            return quantize_widths(x, scale, sigma, masks, self.width_scale[widths[0] - 1 : bits], grids)
        scale, sigma = self._along_rows(scale, x), self._along_rows(sigma, x)
        options: dict[str, Any] = {
            "bits": bits,
            "min_bits": settings.min_bits if masks is not None else bits,
            "estimator": estimator,
        }
        if settings.nesting == "range" or masks is None:
            return quantize(x, scale, sigma, masks, zero_point=settings.zero_point(bits), **options)
        options["zero_points"] = [settings.zero_point(k) for k in widths]
        width_scales = torch.stack([self._along_rows(s, x) for s in self.width_scale[widths[0] - 1 : bits]])
        return quantize_resolution(x, scale, sigma, masks, width_scales=width_scales, one_width=quantize, **options)

    def _along_rows(self, value: Tensor, rows: Tensor) -> Tensor:
        """One value, or one for each channel of the tensor of :meth:`_rows`, in a shape that broadcasts to it."""
        return along_channels(value, rows.dim(), self.channel_dim)

    # Ranges ---------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _fit_to(self, x: Tensor) -> None:
        """Fit an unknown range to the input of a forward."""
        settings = self.settings
        if settings.kind == "weight":
            self.fit_weight(x, settled=self.training and torch.is_grad_enabled())
            return
        # If calibration saw only zeros, the range is fitted to the first other values.
        if not (self.training or self.fits_next or settings.settled):
            raise RuntimeError(
                "An activation quantizer was evaluated before its range was known: call calibrate(model, batches) with "
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
        """Fit the initial grids to a weight and reset the learned parameters.

        For a weight of zeros the range stays unknown.

        Args:
            weight: Full-precision weight.
            settled: Whether these are the values to train, not ones that may still be initialized or loaded over.
        """
        settings = self.settings
        fits = fit_rows(
            self.rows_of(weight, settings.channels),
            self.fitted_widths,
            settings.range_rule,
            self.balanced_widths(weight),
        )
        if fits is None:
            self.configure(fitted=False, settled=settled)
            return
        self._set_initial_grids(fits, settled=settled)

    @torch.no_grad()
    def rows_of(self, weight: Tensor, count: int) -> WeightRows:
        """The values of a weight, in ``count`` rows: a single one, or one for each channel or group."""
        settings = self.settings
        channel_dim = settings.channel_dim if count > 1 else None
        return weight_rows(weight, channel_dim, settings.group_size if count > 1 else 0)

    @property
    def has_balanced_grids(self) -> bool:
        """Whether the grid of some fitted width is balanced."""
        settings = self.settings
        return any(settings.doubled_zero_points[k - 1] % 2 for k in self.fitted_widths)

    @property
    def prefers_balanced_grids(self) -> bool:
        """Whether a weight gets a balanced grid at some width, unless its zeros mean something."""
        return self.kind == "weight" and bool(self.balanced_widths(torch.ones(1)))

    def balanced_widths(self, weight: Tensor) -> set[int]:
        """The widths at which ``weight`` gets a balanced grid."""
        return balanced_widths(weight, self.fitted_widths, self.settings.grid, self.min_bits)

    @property
    def fitted_widths(self) -> list[int]:
        """Widths with separate scales, the widest one first."""
        settings = self.settings
        narrower = range(settings.min_bits, settings.bits) if settings.nesting == "resolution" else ()
        return [settings.bits, *narrower]

    def fit_activation(self, observer: RangeObserver) -> None:
        """Fit the initial scale and the sign of the grid to the values of an observer.

        Without values nothing changes. If all values are zero, the range stays unknown.
        """
        settings = self.settings
        if not observer.has_values:
            return
        # A number from an audit, which knows the batch size, takes precedence.
        numel = settings.numel or observer.per_sample
        fits = observer.fit(self.fitted_widths, settings.range_rule, settings.grid)
        if fits is None:
            self.configure(numel=numel, fitted=False, settled=True)
            return
        self._set_initial_grids(fits, numel=numel, settled=True)

    @torch.no_grad()
    def _set_initial_grids(self, fits: Sequence[GridFit], **settings: Any) -> None:
        """Set the initial grid of each fitted width, and reset the learned parameters."""
        self.configure(doubled_zero_points=self._zero_points_of(fits), **settings)
        width_scale = self._doubling(self._host.bits).clone()
        for k, fit in zip(self.fitted_widths, fits, strict=True):
            width_scale[k - 1] = fit.scale / fits[0].scale
        self._write_ranges(fits[0].scale, width_scale)
        self.log_scale.zero_()
        self.noise_logit.fill_(noise_logit(_INITIAL_NOISE))
        self.fits_next = False

    def _zero_points_of(self, fits: Sequence[GridFit]) -> tuple[int, ...]:
        """Twice the zero point of each width from 1 to 8, from those of :attr:`fitted_widths`."""
        settings, zero_points = self.settings, list(self.settings.doubled_zero_points)
        for k, fit in zip(self.fitted_widths, fits, strict=True):
            zero_points[k - 1] = doubled(fit.zero_point)
        if settings.nesting == "range":
            for k in range(1, settings.bits):
                zero_points[k - 1] = doubled(narrower_zero_point(fits[0].zero_point, settings.bits, k))
        return tuple(zero_points)

    @torch.no_grad()
    def renew(self, fits: Sequence[GridFit], where: Tensor) -> None:
        """Restart from new grids where a range is stale; the learned noise is kept.

        Args:
            fits: A grid for each of :attr:`fitted_widths`, with scales of shape (1,), (channels,) or (groups,). The
                zero points change for all of them.
            where: Which scales to replace, same shape, bool.
        """
        self.configure(doubled_zero_points=self._zero_points_of(fits))
        width_scale = self.width_scale.clone()
        for k, fit in zip(self.fitted_widths, fits, strict=True):
            width_scale[k - 1] = torch.where(where, fit.scale / fits[0].scale, width_scale[k - 1])
        self._write_ranges(torch.where(where, fits[0].scale, self._start()), width_scale)
        self.log_scale.masked_fill_(where, 0.0)
        self.measured = None

    @torch.no_grad()
    def propose(self, fits: Sequence[GridFit]) -> None:
        """Store new grids, as for :meth:`renew`, until :meth:`accept`: a forward that backward recomputes must use the
        grids of its first run.
        """
        state, start = self._writable(), self._places.pending.start
        for index, fit in enumerate(fits):
            state[start + index] = fit.scale
        self._host = self._host._replace(pending=True, pending_zero_points=self._zero_points_of(fits))
        self._write_header()

    @torch.no_grad()
    def accept(self) -> bool:
        """Restart from the proposed grids; return whether there were any."""
        settings = self.settings
        if not settings.pending:
            return False
        flat = self.state[self._places.pending] / weight_of_pending(self.state)
        fits = [
            GridFit(flat[index : index + 1], settings.pending_zero_points[k - 1] / 2)
            for index, k in enumerate(self.fitted_widths)
        ]
        self.renew(fits, torch.ones_like(self.log_scale, dtype=torch.bool))
        return True

    def refit_next(self) -> None:
        """Fit the range again to the next input, also in evaluation mode, which frozen layers use in training."""
        self.configure(fitted=False, pending=False, pending_zero_points=UNSIGNED)
        self.fits_next = True

    def extra_repr(self) -> str:
        settings = self.settings
        state = f", group_size={settings.group_size}" if settings.group_size else ""
        state += "" if settings.active else ", inactive"
        width = f"{settings.min_bits}-{settings.bits}" if _has_gates(settings) else f"{settings.bits}"
        return f"{settings.kind}, bits={width}, {settings.estimator}{state}"


def _is_traced() -> bool:
    """Whether code is being compiled, exported or traced, or a ``torch.func`` transform is active."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _has_gates(settings: Settings) -> bool:
    return settings.min_bits < settings.bits and not settings.fixed


def _quant_grid(settings: Settings, bits: int) -> QuantGrid:
    return QuantGrid.of(bits, settings.zero_point(bits), cast(Estimator, settings.estimator))


def _span(kind: Kind, config: CPQConfig) -> tuple[int | None, int | None]:
    """Widest and narrowest width."""
    if kind == "weight":
        return config.weight_bits, config.narrowest_bits
    return config.act_bits, config.narrowest_act_bits
