"""TaperNorm: a normalization layer that one shared gate turns into a linear map (arXiv:2602.10408, section 3).

With ``h`` a token's vector, ``r(h)`` the norm's denominator, ``c`` the alignment scalar and ``g`` the gate::

    RMSNorm kind    y = g * h / r(h) * gamma + (1 - g) * c * h * gamma~
    LayerNorm kind  y = g * ((h - mean) / s(h) * gamma + beta) + (1 - g) * (c * (h - mean) * gamma~ + beta~)

``beta`` is the norm's own ``bias``; ``gamma`` its own ``weight`` or, as in Gemma, ``1 + weight``; ``gamma~`` and
``beta~`` are ``taper_weight`` and ``taper_bias``, read the same way. A norm without a bias may get a ``beta~`` all the
same (:meth:`TaperNorm.add_bias`), which starts at 0::

    RMSNorm kind    y = g * h / r(h) * gamma + (1 - g) * (c * h * gamma~ + beta~)

``c`` is fitted to the tokens' ``1 / r`` (:class:`AlignmentFit`). Position 0 of every sequence may have a scalar of its
own on the way (:meth:`TaperNorm.separate_first`): there ``c`` is ``c_0 = c_first^s * c^(1 - s)``, where ``s`` is 1
until the gate has closed and then falls to 0, which leaves the one map for all. The two differ by a hundredfold in
pretrained models: a geometric mean goes from one to the other by equal factors, where an arithmetic one would jump.
"""

import ctypes
import enum
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from taperlit.autograd import only_backward
from taperlit.errors import TaperlitError
from taperlit.schedule import gate_at


class Phase(enum.Enum):
    """What a TaperNorm computes. It follows from the gate alone, and is a Python value so that forward never syncs."""

    NORMALIZE = "normalize"  # g = 1: the norm's own forward, bit for bit
    BLEND = "blend"  # 0 < g < 1
    LINEAR_FIRST = "linear_first"  # g = 0 and s > 0: an affine map, with another scalar at position 0
    LINEAR = "linear"  # g = 0: an affine map with no per-token statistic


_PHASES = {phase.value: phase for phase in Phase}


def plain_name(name: str) -> str:
    """A parameter's or module's name without the marks of the wrappers around it (FSDP1, ``torch.compile``)."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


class Float32State(nn.Module):
    """A module whose tensors named in ``float32_state`` stay float32 when the module is cast to another dtype."""

    float32_state: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32State":
        before = {name: old for name in self.float32_state if (old := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name) if name in self._buffers else fn(old)
            setattr(self, name, new if new.dtype == old.dtype else old.to(new.device))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copy the plain tensors: a process that is started with the module gets them in memory shared by all.

        Lightning's "ddp_spawn" copies parameters and buffers for that reason, and knows no others.
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self.float32_state:
            if isinstance(plain := self.__dict__.get(name), Tensor):
                setattr(self, name, plain.clone())


@dataclass
class GatePlan:
    """What the parts of a run that move a gate have announced to each other; plain Python, saved nowhere.

    Args:
        warmup: the last optimizer step at ``g = 1``, once a schedule has said so. It may rise by one in every step that
            reaches it, where the schedule waits for something; it is never lowered.
        end: the first optimizer step at ``g = 0``, likewise, if nobody delays it.
        alignment: somebody will freeze the alignment scalars when the warm-up ends.
        first: somebody will take the share of the first position's own scalar to 0.
        shape: of the way from 1 to 0, see :func:`taperlit.schedule.gate_at`.
        delay: by how many steps the schedule's clock is behind the optimizer's; from the first step below 1 on.
        latest: the optimizer step from which ``g = 0`` whatever happens, where somebody may delay it.
    """

    warmup: int | None = None
    end: int | None = None
    alignment: bool = False
    first: bool = False
    shape: str = "cosine"
    delay: int = 0
    latest: int | None = None

    @property
    def closed_by(self) -> int | None:
        """The step from which the gate is at 0 at the latest; None where no schedule has said so."""
        return self.end if self.end is None or self.latest is None else max(self.end, self.latest)

    def gate(self, step: int) -> float:
        """The gate that the schedule plans for an optimizer step, counted from 1; 1 where there is no schedule."""
        if self.warmup is None or self.end is None:
            return 1.0
        return gate_at(step - self.delay, self.warmup, self.end, self.shape)


def call_me(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there.

    ``nn.TransformerEncoderLayer`` has a fused path that reads its norms' parameters and never calls the norms; it takes
    the other path when a module in it has a hook. A gate has one, which is never run, for gates are not called.
    """


class _Number:
    """What a 0-d float32 tensor holds, whoever wrote it, without waiting for a device that has not changed it."""

    def __init__(self) -> None:
        self.value = 1.0
        self._seen: tuple[int, int] | None = None  # the tensor and its version that the value was read from
        self._address = 0
        self._memory: ctypes.c_float | None = None  # where the value lies, to be read without an operation

    def __getstate__(self) -> dict[str, Any]:
        """All but the address, which is another in a copy."""
        return {**self.__dict__, "_address": 0, "_memory": None}

    def look(self, tensor: Tensor) -> float:
        """The value now; on a GPU it is read when torch has counted a write to it."""
        if (address := tensor.data_ptr()) != self._address:
            self._address, self._seen = address, None
            # Straight from memory: item() would be an operation, which tracers and other modes see.
            self._memory = ctypes.c_float.from_address(address) if tensor.device.type == "cpu" else None
        if self._memory is not None:
            self.value = self._memory.value
        elif self._seen is None or self._seen != self._stamp(tensor):
            self.read(tensor)
        return self.value

    def read(self, tensor: Tensor) -> None:
        """Read the value; waits for the device."""
        if not tensor.is_meta:
            self.value, self._seen = tensor.item(), self._stamp(tensor)

    @torch.no_grad()
    def write(self, tensor: Tensor, value: float) -> None:
        """Write a value, which then need not be read."""
        tensor.fill_(value)
        self.value, self._seen = torch.tensor(value, dtype=torch.float32).item(), self._stamp(tensor)

    @staticmethod
    def _stamp(tensor: Tensor) -> tuple[int, int] | None:
        # Inference tensors count no writes.
        return None if tensor.is_inference() else (id(tensor), tensor._version)


Stage = tuple[float, float]
"""``(high, low)``: a norm's own gate is 1 while the global gate is ``high`` or more, and 0 from ``low`` on."""


def at_stage(g: float, stage: Stage | None) -> float:
    """A norm's own gate at the global gate ``g``: ``(g - low) / (high - low)`` within [0, 1]; None is ``g`` itself."""
    if stage is None:
        return g
    high, low = stage
    return min(1.0, max(0.0, (g - low) / (high - low)))


def _phase_of(g: float, s: float) -> Phase:
    if g:
        return Phase.NORMALIZE if g == 1.0 else Phase.BLEND
    return Phase.LINEAR_FIRST if s else Phase.LINEAR


class Gate(Float32State):
    """The global gate ``g`` in [0, 1], shared by every TaperNorm of a model.

    ``value`` is a 0-d float32 buffer, so a moving gate neither syncs nor recompiles; ``phase`` follows it. So is
    ``first``, the share ``s`` of the first position's own scalars; None, and in no state dict, where there are none.
    """

    float32_state = ("value", "first")
    value: Tensor
    first: Tensor | None

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("first", None)
        self.plan = GatePlan()
        self._phase = Phase.NORMALIZE
        self._g, self._s = _Number(), _Number()
        self._known = (1.0, 0.0)  # g and s that the phase follows from
        # The phases, by name, of the norms that have a gate of their own between two values of g. By name, for
        # torch.compile looks again at strings, but not at each of several enum members that it meets in one graph.
        self._stages: dict[Stage, str] = {}
        self.register_forward_pre_hook(call_me)

    @property
    def phase(self) -> Phase:
        """The phase of the values as they are now, whoever wrote them: ``set``, a state dict, weight averaging.

        On a GPU, where reading a value would wait for the device, it is read when torch has counted a write to it.
        Writes through ``.data`` are not counted; call :meth:`refresh` after them. Compiled code reads the last phase
        and is compiled again when that changes.
        """
        value = self._buffers["value"]  # past nn.Module's slower look-up: every norm asks in every pass
        if torch.compiler.is_compiling() or type(value) is not Tensor:
            return self._phase
        first = self._buffers["first"]
        known = (self._g.look(value), 0.0 if first is None else self._s.look(first))
        if known != self._known:
            self._follow(known)
        return self._phase

    def _follow(self, known: tuple[float, float]) -> None:
        self._known = known
        g, s = known
        self._phase = _phase_of(g, s)
        for stage in self._stages:
            self._stages[stage] = _phase_of(at_stage(g, stage), s).value

    def number(self) -> float:
        """The gate as a Python number; as with ``phase``, it waits for no device that has not changed it."""
        _ = self.phase  # which looks
        return self._known[0]

    def add_stage(self, stage: "Stage") -> None:
        """Have a phase for the norms of this stage, which follows the gate as ``phase`` does."""
        g, s = self._known
        self._stages[stage] = _phase_of(at_stage(g, stage), s).value

    def phase_at(self, stage: "Stage") -> Phase:
        """The phase of the norms of a stage that was added."""
        if not torch.compiler.is_compiling():
            _ = self.phase  # which looks
        return _PHASES[self._stages[stage]]

    def refresh(self) -> None:
        """Read the values and let the phase follow; waits for the device."""
        self._g.read(self.value)
        if self.first is not None:
            self._s.read(self.first)
        self._follow((self._g.value, 0.0 if self.first is None else self._s.value))

    def reset_parameters(self) -> None:
        """Open the gate: ``g = 1``, and ``s = 1`` where there is one."""
        self.set(1.0)
        if self.first is not None:
            self.set_first(1.0)

    def set(self, g: float) -> None:
        """Set the gate.

        Raises:
            TaperlitError: ``g`` is not in [0, 1].
        """
        if not 0.0 <= g <= 1.0:
            raise TaperlitError(f"The gate must be between 0 and 1, not {g}.")
        self._g.write(self.value, g)
        self._follow((self._g.value, self._known[1]))

    def set_first(self, s: float) -> None:
        """Set the share of the first position's own scalars; 0 is what a gate without any has.

        Raises:
            TaperlitError: ``s`` is not in [0, 1], or above 0 where the first position has no scalar of its own.
        """
        if not 0.0 <= s <= 1.0:
            raise TaperlitError(f"The first position's share must be between 0 and 1, not {s}.")
        if self.first is None:
            if s:
                raise TaperlitError(
                    "The first position has no scalar of its own; call taperlit.surgery.separate_first(model) first."
                )
            return
        self._s.write(self.first, s)
        self._follow((self._known[0], self._s.value))

    def separate_first(self) -> None:
        """Have a share ``s``, of 1, from now on; one that has it keeps it as it is."""
        if self.first is None:
            self.first = torch.ones_like(self.value)
            self._s = _Number()
            self._follow((self._known[0], 1.0))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _ = self.phase  # which looks: compiled code reads the last phase, and does not look for itself

    def extra_repr(self) -> str:
        """The phase."""
        return self.phase.value


class _HoldIdle(torch.autograd.Function):
    """Identity on ``y`` that hands every idle parameter a zero gradient.

    DDP waits for the gradient of every parameter and FSDP reduces one fixed set, while the phases use different ones;
    without it each change of phase would need ``find_unused_parameters``. ``GateSchedule`` takes the zeros away again
    before the optimizer steps, so that an idle parameter neither decays nor gathers moments.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (*grads, *(torch.zeros_like(p) for p in ctx.saved_tensors))


class _Blend(torch.autograd.Function):
    """``y = h * (a / r(h) + b) + shift``: both branches of the blend, in the fewest passes over memory.

    ``h`` is (..., d), and ``a``, ``b`` and ``shift`` broadcast to it. torch's operations one by one take more than
    twice as long: each of a dozen forward and two dozen backward reads and writes all of ``h``.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, a: Tensor, b: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        inverse = _root_mean_square(h, (-1,), eps).reciprocal_()  # (..., 1)
        ctx.save_for_backward(h, inverse, a, b, shift)
        ctx.eps = eps
        y = torch.addcmul(b, inverse, a).mul_(h)
        return y if shift is None else y.add_(shift)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        h, inverse, a, b, shift = ctx.saved_tensors
        (grad,) = outer
        if torch.is_grad_enabled():  # create_graph: let torch differentiate, and again
            y = h * (a / _root_mean_square(h, (-1,), ctx.eps) + b)
            y = y if shift is None else y + shift
            inputs = [p for p, needed in zip((h, a, b, shift), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None)
        product = grad * h
        of_b = product.sum_to_size(b.shape) if ctx.needs_input_grad[2] else None
        product.mul_(inverse)
        of_a = product.sum_to_size(a.shape) if ctx.needs_input_grad[1] else None
        of_shift = grad.sum_to_size(shift.shape) if ctx.needs_input_grad[3] else None
        of_h = None
        if ctx.needs_input_grad[0]:
            along = product.mul_(a).sum(-1, keepdim=True)  # the gradient along h, which changes r
            of_h = torch.addcmul(b, inverse, a).mul_(grad)
            of_h.addcmul_(h, along.mul_(inverse.square()), value=-1 / h.shape[-1])
        return of_h, of_a, of_b, of_shift, None


def _root_mean_square(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """``sqrt(mean(x^2) + eps)`` over ``dims``, which are kept: one pass over ``x``."""
    count = math.prod([x.shape[dim] for dim in dims])  # a list: torch.compile knows no generators here
    return (torch.linalg.vector_norm(x, dim=dims, keepdim=True).square() / count + eps).sqrt()


@dataclass(frozen=True)
class NormKind:
    """What a norm computes: ``y = (h P) / sqrt(mean((h P)^2) + eps) * (gain_offset + weight) + bias``.

    Args:
        shape: the trailing shape that is normalized together.
        centred: ``P`` subtracts the mean (the LayerNorm kind); else it is the identity.
        gain_offset: 1 where the gain is ``1 + weight``, else 0.
        eps: None is the input dtype's epsilon, as in :class:`torch.nn.RMSNorm`.
    """

    shape: tuple[int, ...]
    centred: bool
    gain_offset: float
    eps: float | None


@dataclass(frozen=True)
class AlignmentFit:
    """What the alignment scalar is fitted to: ``c = E[w / r] / E[w]``, the mean of ``1 / r`` under weights ``w``.

    With ``n = h D / r`` the norm's output without its bias, ``c h D`` is fitted to it::

        energy   w = ||h D||^2   c minimises E[||n - c h D||^2], as in arXiv:2602.10408
        token    w = 1           c minimises E[||n - c h D||^2 / ||h D||^2] = E[(1 / r - c)^2]

    The energy of a few tokens with a huge residual outweighs all others', and the scalar then fits those tokens alone:
    where one token beside ``T`` equal ones is ``k`` times as large, it is ``(1 + k / T) / (1 + k^2 / T)`` of theirs.
    Weighed alike, tokens count by their number; but then nothing holds the huge ones down when the gate closes, and in
    models that have them they should get a scalar of their own (:meth:`TaperNorm.separate_first`). A token of all zeros
    has no direction to fit, and weight 0 in both.

    Args:
        weight: ``energy`` or ``token``.
        skip: leave out this many positions at the beginning of each sequence. The norm's inputs must then be
            (B, T, *shape); shorter sequences than that add nothing.

    Raises:
        TaperlitError: there is no such weight, or ``skip`` is negative.
    """

    weight: Literal["energy", "token"] = "energy"
    skip: int = 0

    def __post_init__(self) -> None:
        if self.weight not in ("energy", "token"):
            raise TaperlitError(f"The alignment's fit is {self.weight!r}; choose energy or token.")
        if self.skip < 0:
            raise TaperlitError(f"The alignment's skip is {self.skip}; it must be 0 or more positions.")


class TaperNorm(Float32State):
    """The part that every tapered norm shares: a mix-in before the norm's own class.

    Use :class:`TaperRMSNorm` or :class:`TaperLayerNorm` in a model of yours, or :func:`taperlit.taper`, which turns the
    norms of any model into TaperNorms: the instances stay and change their class to a subclass of both this and their
    own, so that ``g = 1`` is their own forward, bit for bit.

    A norm that is given a ``gate`` borrows it and leaves it out of its state dict; one that is given none owns its
    own. In a model the first norm owns the gate that all share, see :func:`share_gate`. Alignment statistics are
    gathered in training while ``g = 1``: call :func:`update_alignment` once per optimizer step, and :meth:`freeze` at
    the boundary.

    Attributes:
        alignment: ``c``, 0-d float32; 1 until it is frozen.
        alignment_ema: (3,) float32 moving averages of ``w / r``, ``w`` (see :class:`AlignmentFit`) and 1; the third
            corrects the bias of the first two.
        alignment_fit: what is weighed how in them; not saved.
        taper_weight: ``gamma~``, of ``kind.shape``, read as the norm's own ``weight``; None where that has none.
        taper_bias: ``beta~``, likewise; None where the norm has no bias and :meth:`add_bias` was not called.
        first_alignment: position 0's own scalar ``c_first``, 0-d float32; None unless :meth:`separate_first` was
            called, and so are the next two.
        first_alignment_ema: as ``alignment_ema``, over position 0 alone, which that one then leaves out.
        first_pending: as ``pending``, likewise.
        label: the norm's name in its model, for errors; empty where nobody has said it.
        stage: (2,) float32 ``high`` and ``low`` of the norm's own gate (:meth:`set_stage`); None is the global gate.
        tracks: go on gathering the alignment statistics while ``0 < g < 1``; not saved.
        frozen: 0-d float32: 1 once :meth:`freeze` has run, else 0. (Averages of weights take no booleans.)
        peak: None, or (3,) float32: where somebody has put a tensor here, the largest that one token's scale was in
            training since the tensor was last zeroed, the scales' sum, and their number. Plain, as ``pending``.
        pending: (3,) float32 sums over the micro-batches since the last update. A plain tensor, not a buffer: DDP
            copies rank 0's buffers over the other ranks' before every forward, which would lose their statistics.
    """

    float32_state = (
        "alignment", "alignment_ema", "frozen", "pending", "first_alignment", "first_alignment_ema", "first_pending",
        "peak", "stage",
    )  # fmt: skip
    taper_weight: nn.Parameter | None
    taper_bias: nn.Parameter | None
    alignment: Tensor
    alignment_ema: Tensor
    frozen: Tensor
    pending: Tensor
    first_alignment: Tensor | None
    first_alignment_ema: Tensor | None
    first_pending: Tensor | None = None
    peak: Tensor | None = None
    stage: Tensor | None
    alignment_fit = AlignmentFit()
    label = ""
    tracks = False
    _stage: Stage | None = None  # the same as Python numbers

    def _init_taper(self, kind: NormKind, gate: Gate | None, device: torch.device | None = None) -> None:
        weight, bias = self.own("weight"), self.own("bias")
        device = device if weight is None else weight.device
        self.kind = kind
        # A norm without affine parameters has nothing to copy at the boundary: its linear map is c alone.
        for name, source in (("taper_weight", weight), ("taper_bias", bias)):
            twin = None if source is None else nn.Parameter(source.detach().clone(), source.requires_grad)
            self.register_parameter(name, twin)
        self.register_buffer("alignment", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("alignment_ema", torch.zeros(3, dtype=torch.float32, device=device))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("first_alignment", None)
        self.register_buffer("first_alignment_ema", None)
        self.register_buffer("stage", None)
        self.pending = torch.zeros(3, dtype=torch.float32, device=device)
        # A child of owner and borrowers alike, so that torch.compile makes one graph for both.
        self.gate = Gate(device).train(self.training) if gate is None else gate
        self.owns_gate = gate is None
        if self.gate.first is not None:
            self.separate_first()

    def own(self, name: str) -> nn.Parameter | None:
        """The norm's own ``weight`` or ``bias``; not every class has both."""
        return cast("nn.Parameter | None", getattr(self, name, None))

    def add_bias(self) -> None:
        """Give the linear branch of a norm without a bias one of its own: ``taper_bias``, of zeros, to be trained.

        It changes no output until it is trained, and folds into the biases of the matrices that the norm feeds, as a
        LayerNorm's does. It is a parameter like the others, so add it before optimizers are made and the model is
        split. Nothing happens where the linear branch has a bias.

        Raises:
            TaperlitError: the linear branch is the norm's own, as in FakeLN.
        """
        if "taper_bias" not in self._parameters:
            raise TaperlitError(
                f"The linear branch of {self.label or type(self).__name__} is the norm itself and has no parameters of "
                "its own; a bias can be added to those of taperlit.taper(model)."
            )
        if self.taper_bias is None:
            weight = self.own("weight")
            device, dtype = (self.alignment.device, None) if weight is None else (weight.device, weight.dtype)
            self.taper_bias = nn.Parameter(torch.zeros(self.kind.shape, device=device, dtype=dtype))

    @property
    def centred(self) -> bool:
        """Whether it is of the LayerNorm kind, which subtracts the mean in every phase."""
        return self.kind.centred

    @property
    def gain_offset(self) -> float:
        """What is added to ``weight`` and ``taper_weight`` to make a gain: 0, or 1 as in Gemma."""
        return self.kind.gain_offset

    def borrow(self, gate: Gate) -> None:
        """Use another norm's gate."""
        self.gate, self.owns_gate = gate, False
        if self._stage is not None:
            gate.add_stage(self._stage)
        if self.first_alignment is not None or gate.first is not None:
            self.separate_first()

    def set_stage(self, stage: Stage | None) -> None:
        """Give the norm a gate of its own, which is saved with it, or the global one again.

        With ``(high, low)`` it is 1 while the global gate ``g`` is ``high`` or more, 0 from ``low`` on, and
        ``(g - low) / (high - low)`` between them: the global gate's shape on a part of its way. At ``g = 1`` and
        ``g = 0`` all norms are as without stages.

        Args:
            stage: ``high`` and ``low``, rounded to float32; None is the global gate, as ``(1, 0)``.

        Raises:
            TaperlitError: not ``0 <= low < high <= 1``.
        """
        if stage is not None and not 0 <= stage[1] < stage[0] <= 1:
            raise TaperlitError(f"The stage (high, low) is {stage}; it must be 0 <= low < high <= 1.")
        device = self.alignment.device
        self.stage = None if stage is None else torch.tensor(stage, dtype=torch.float32, device=device)
        self._read_stage()

    def _read_stage(self) -> None:
        if self.stage is None:
            self._stage = None
        elif not self.stage.is_meta:
            high, low = self.stage.tolist()
            self._stage = (high, low)
            self.gate.add_stage(self._stage)

    @property
    def phase(self) -> Phase:
        """What the norm computes now: the gate's phase, or that of its own gate where it has a stage."""
        gate = cast(Gate, self._modules["gate"])  # past nn.Module's slower look-up
        return gate.phase if self._stage is None else gate.phase_at(self._stage)

    @property
    def own_gate(self) -> Tensor:
        """The gate in use, 0-d float32: the global one, or the norm's own where it has a stage."""
        if self._stage is None or self.stage is None:
            return self.gate.value
        high, low = self.stage
        return ((self.gate.value - low) / (high - low)).clamp(0.0, 1.0)

    def own_gate_at(self, g: float) -> float:
        """The same as a Python number, were the global gate ``g``."""
        return at_stage(g, self._stage)

    @torch.no_grad()
    def separate_first(self) -> None:
        """Give position 0 a scalar of its own, fitted to it alone, which then counts by the gate's share ``s``.

        Inputs must be (B, T, *shape) from then on, and ``T > 1`` outside training while ``g < 1`` and ``s > 0``: with a
        cache of keys and values, the one token that a step brings is not the first. Nothing happens where it has one.
        """
        self.gate.separate_first()
        if self.first_alignment is None:
            self.first_alignment = self.alignment.clone()
            self.first_alignment_ema = torch.zeros_like(self.alignment_ema)
            self.first_pending = torch.zeros_like(self.pending)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Torch's state dict, where a borrowed gate is left to its owner."""
        state: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        if not self.owns_gate:
            for name in self.gate.state_dict():
                del state[f"{prefix}gate.{name}"]
        return state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the norm, make the linear branch equal to it, forget the statistics and open the gate."""
        if (reset := getattr(super(), "reset_parameters", None)) is not None:
            reset()
        if "alignment" not in self._buffers:
            return  # called by torch's constructor, before the taper exists
        self._copy_affine()
        self.alignment.fill_(1.0)
        if self.first_alignment is not None:
            self.first_alignment.fill_(1.0)
        self.forget_alignment()
        self.gate.reset_parameters()

    @torch.no_grad()
    def forget_alignment(self) -> None:
        """Forget the statistics, and that the scalars were frozen."""
        self.frozen.zero_()
        self.forget_pending()
        for _, ema, _ in self._statistics():
            ema.zero_()

    @torch.no_grad()
    def forget_pending(self) -> None:
        """Forget the micro-batches since the last :func:`update_alignment`."""
        for pending, _, _ in self._statistics():
            pending.zero_()

    def _statistics(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What each scalar comes from: the pending sums and the moving averages, (3,) each, and the scalar, 0-d."""
        yield self.pending, self.alignment_ema, self.alignment
        if self.first_pending is not None:
            yield self.first_pending, cast(Tensor, self.first_alignment_ema), cast(Tensor, self.first_alignment)

    def _copy_affine(self) -> None:
        for name in ("weight", "bias"):
            source, twin = self.own(name), getattr(self, f"taper_{name}")
            if twin is not None and source is not None:
                twin.copy_(source)
            elif twin is not None:
                twin.zero_()  # a bias of the linear branch alone

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., *shape) to the same shape: by the norm itself, by a blend, or by the linear map."""
        if x.is_nested:
            parts = [self.forward(part[None])[0] for part in x.unbind()]  # of a sequence each
            return torch.nested.as_nested_tensor(parts, layout=x.layout)
        phase = self.phase
        if phase is Phase.LINEAR:
            y = self._linear(x, self.alignment)
        elif phase is Phase.LINEAR_FIRST:
            y = self._linear(x, self._scalars(x))
        else:
            fast = self._fast_blend(x) if phase is Phase.BLEND else None
            normed = y = super().forward(x) if fast is None else fast
            if phase is Phase.BLEND and fast is None:
                y = self._blend(x, normed)
            if (phase is Phase.NORMALIZE or self.tracks) and self.training and torch.is_grad_enabled():
                self._record(x, None if fast is not None else normed)
        if self.training and torch.is_grad_enabled():
            if self.peak is not None:
                self._record_peak(x)
            idle = [p for p in self.idle_parameters() if p.requires_grad]
            if idle:
                y = cast(Tensor, _HoldIdle.apply(y, *idle))  # type: ignore[no-untyped-call]
        return y

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the current phase does not use.

        Their gradient is zero, not None, so that DDP and FSDP see one fixed set. Set it to None before the optimizer
        steps (``GateSchedule`` does) and they get no decay and no moments either.
        """
        phase = self.phase
        names: tuple[str, ...] = ()
        if phase is Phase.NORMALIZE:
            names = ("taper_weight", "taper_bias")
        elif phase is not Phase.BLEND:
            names = ("weight", "bias")
        for name in names:
            if (parameter := self.own(name)) is not None:
                yield parameter

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.kind.shape), 0))

    def _denominator(self, x: Tensor) -> Tensor:
        """``r(h)``, or ``s(h)`` of the already centred ``h``: (..., 1) in the dtype of ``x``."""
        eps = self.kind.eps if self.kind.eps is not None else torch.finfo(x.dtype).eps
        return _root_mean_square(x, self._dims, eps)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(self._dims, keepdim=True) if self.kind.centred else x

    def _gain(self, weight: nn.Parameter) -> Tensor:
        return weight + self.kind.gain_offset if self.kind.gain_offset else weight

    def _length(self, x: Tensor) -> int:
        """``T`` of an input (B, T, *shape), where positions can be told.

        Raises:
            TaperlitError: the input has other dimensions, of which none need be the sequence.
        """
        if x.dim() != len(self.kind.shape) + 2:
            shape = ", ".join(map(str, ("B", "T", *self.kind.shape)))
            raise TaperlitError(
                f"{self.label or type(self).__name__} is given {tuple(x.shape)} and not ({shape}), so its positions "
                "cannot be told: leave it untapered, or use neither the alignment's skip nor a separate first position."
            )
        return x.shape[1]

    def _scalars(self, x: Tensor) -> Tensor:
        """``c`` of each position of ``x`` (B, T, *shape): (T, 1, ...), or 0-d where the first is as the others."""
        share, first = self.gate.first, self.first_alignment
        if share is None or first is None:
            return self.alignment
        length = self._length(x)
        if length == 1 and not self.training:
            raise TaperlitError(
                f"{self.label or type(self).__name__} is given one token, which with a cache of keys and values is not "
                "the first: run whole sequences (use_cache=False), of two tokens or more, until the first position's "
                "own scalar is gone."
            )
        own = self.alignment * (first / self.alignment) ** share
        c = torch.cat((own.expand(min(length, 1)), self.alignment.expand(max(length - 1, 0))))
        return c.view(-1, *(1 for _ in self.kind.shape))

    def _blend(self, x: Tensor, normed: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)  # at least float32, whatever autocast says
        scaled = self._centre(x.to(dtype)) * self._scalars(x)
        if self.taper_weight is not None:
            scaled = scaled * self._gain(self.taper_weight)
        if self.taper_bias is not None:
            scaled = scaled + self.taper_bias
        return torch.lerp(scaled.to(dtype), normed.to(dtype), self.own_gate.to(dtype)).to(x.dtype)

    def _fast_blend(self, x: Tensor) -> Tensor | None:
        """The same in one step, for torch's own norms while they train in eager mode; None elsewhere."""
        weight, bias, eps = self.own("weight"), self.own("bias"), self.kind.eps
        if (
            type(self) not in (TaperRMSNorm, TaperLayerNorm)
            or eps is None
            or x.shape[-len(self.kind.shape) :] != (self.kind.shape)
        ):
            return None
        if not only_backward(x, weight, bias, self.taper_weight, self.taper_bias):
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        g = self.own_gate.to(dtype)
        rest = 1 - g
        size = math.prod(self.kind.shape)
        scalars = self._scalars(x)
        b = rest * scalars.to(dtype)
        b = b.flatten()[:, None].expand(-1, size) if b.dim() else b.expand(size)  # (T, d) or (d,)
        a = g.expand(size)
        if weight is not None and self.taper_weight is not None:
            a, b = a * weight.to(dtype).flatten(), b * self.taper_weight.to(dtype).flatten()
        shift = None
        if self.taper_bias is not None:
            shift = self.taper_bias.to(dtype).flatten()
            shift = shift * rest if bias is None else torch.lerp(shift, bias.to(dtype).flatten(), g)
        h = self._centre(x.to(dtype)).reshape(-1, *scalars.shape[:1], size)
        y: Tensor = _Blend.apply(h, a, b, shift, eps)  # type: ignore[no-untyped-call]
        return y.view(x.shape).to(x.dtype)

    def _linear(self, x: Tensor, c: Tensor) -> Tensor:
        gain = c if self.taper_weight is None else c * self._gain(self.taper_weight)
        y = self._centre(x) * gain.to(x.dtype)
        return y if self.taper_bias is None else y + self.taper_bias.to(x.dtype)

    @torch.no_grad()
    def _record(self, x: Tensor, y: Tensor | None) -> None:
        """Add this micro-batch's means over tokens of ``w / r(h)`` and ``w`` to ``pending``, and so for position 0.

        ``y`` is the norm's output, where there is one: without a bias it is ``h D / r``, and need not be made again.
        """
        if x.numel() == 0:
            return
        h = self._centre(x.detach().float())
        r = self._denominator(h)
        weight = self.own("weight")
        if y is not None and self.own("bias") is None and y.dtype == torch.float32:
            scaled_norm = torch.linalg.vector_norm(y.detach(), dim=self._dims, keepdim=True) * r
        else:
            scaled = h if weight is None else h * self._gain(weight).float()
            scaled_norm = torch.linalg.vector_norm(scaled, dim=self._dims, keepdim=True)
        w = scaled_norm.square() if self.alignment_fit.weight == "energy" else (scaled_norm > 0).float()  # (..., 1)
        ratio, skip = w / r, self.alignment_fit.skip
        if skip or self.first_pending is not None:
            self._length(x)
        if self.first_pending is not None:
            self._add(self.first_pending, ratio[:, :1], w[:, :1])
            skip = max(skip, 1)
        if skip:
            ratio, w = ratio[:, skip:], w[:, skip:]
        self._add(self.pending, ratio, w)

    @torch.no_grad()
    def _record_peak(self, x: Tensor) -> None:
        """Add the tokens' scales to ``peak``: NaN where one is not finite."""
        if x.numel() == 0:
            return
        h = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        scale = h.var(self._dims, correction=0).sqrt() if self.centred else torch.linalg.vector_norm(h, dim=self._dims)
        peak = cast(Tensor, self.peak)
        scale = scale.to(peak.dtype)
        # A checkpointed block that runs forward again changes neither the maximum nor the mean.
        peak.copy_(torch.stack((torch.maximum(peak[0], scale.amax()), peak[1] + scale.sum(), peak[2] + scale.numel())))

    @staticmethod
    def _add(pending: Tensor, ratio: Tensor, w: Tensor) -> None:
        if w.numel():  # else no sequence is so long
            mean = w.mean()
            pending.add_(torch.stack((ratio.mean(), mean, torch.ones_like(mean))))

    @property
    def alignment_moments(self) -> Tensor:
        """The two bias-corrected moving averages, ``E[w / r]`` and ``E[w]`` of :class:`AlignmentFit`: (2,) float32."""
        return self.alignment_ema[:2] / self.alignment_ema[2]

    @property
    def alignment_estimate(self) -> Tensor:
        """``c``: the frozen one, or before the boundary what it would be by the statistics so far. 0-d float32."""
        numerator, denominator, weight = self.alignment_ema
        return torch.where((self.frozen > 0) | (weight == 0), self.alignment, numerator / denominator)

    @torch.no_grad()
    def freeze(self) -> None:
        """The boundary: set ``c`` (and ``c_first``) to its fitted value and copy ``gamma``, ``beta`` to ``gamma~``,
        ``beta~``; without a ``beta`` the latter is 0.

        Raises:
            TaperlitError: no statistics were gathered, or they are zero or not finite.
        """
        fitted = []
        for _, ema, scalar in self._statistics():
            numerator, denominator, weight = ema.tolist()
            c = numerator / denominator if denominator else math.nan
            if not (math.isfinite(c) and c > 0):
                whose = "" if scalar is self.alignment else " of the first position"
                raise TaperlitError(
                    f"No alignment scalar{whose}: the statistics are E[w/r] = {numerator:.3g} and E[w] = "
                    f"{denominator:.3g}, of total weight {weight:.3g}; train with the gate at 1 first, on sequences "
                    "longer than what the fit leaves out."
                )
            fitted.append((scalar, c))
        for scalar, c in fitted:
            scalar.fill_(c)
        self._copy_affine()
        self.frozen.fill_(1.0)

    @torch.no_grad()
    def follow(self) -> None:
        """Set ``c`` (and ``c_first``) to what its moving averages say now; one that they give no number for stays."""
        for _, ema, scalar in self._statistics():
            c = ema[0] / ema[1]
            scalar.copy_(c.where(c.isfinite() & (c > 0), scalar))

    @torch.no_grad()
    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        """Gain ``c * gamma~`` and bias ``beta~`` of ``y = (h P) * gain + bias``, the linear phase: (d,) float64 each.

        ``P`` centres in the LayerNorm kind (``centred``) and is the identity in the RMSNorm kind.
        """
        gain = self.alignment.double().expand(math.prod(self.kind.shape))
        if self.taper_weight is not None:
            gain = gain * (self.kind.gain_offset + self.taper_weight.double().flatten())
        return gain, None if self.taper_bias is None else self.taper_bias.double().flatten()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}first_alignment" in state_dict:
            self.separate_first()
        if f"{prefix}taper_bias" in state_dict and "taper_bias" in self._parameters:
            self.add_bias()
        if f"{prefix}stage" in state_dict and self.stage is None:
            self.stage = torch.ones(2, dtype=torch.float32, device=self.alignment.device)
        own = {prefix + key: value for key, value in self.state_dict().items()}
        plain = {prefix + "weight", prefix + "bias"}
        if not any(key in state_dict for key in own.keys() - plain):
            # A plain norm's state dict: both branches start from its gain and bias, the rest stays as it is.
            for key, value in own.items():
                twin = key.replace(prefix + "taper_", prefix)
                if twin in state_dict or key not in plain:
                    state_dict.setdefault(key, state_dict.get(twin, value))
        if not self.owns_gate:
            state_dict.update({f"{prefix}gate.{key}": value for key, value in self.gate.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_stage()
        if self.pending.is_meta:  # the values were assigned to a model that was built without any
            self.pending = torch.zeros(3, dtype=torch.float32, device=self.alignment.device)
        if self.first_pending is not None and self.first_pending.is_meta:
            self.first_pending = torch.zeros_like(self.pending)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of a tapered foreign norm is made at run time, so no importer finds it by name.
        return _new_tapered, (_OWN_CLASS.get(type(self), type(self)),), self.__dict__.copy()


class TaperRMSNorm(TaperNorm, nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm` (same constructor words, loads its state dict).

    Args:
        normalized_shape: the trailing shape that is normalized together.
        eps: added to the mean square; None is the input dtype's epsilon, as in torch.
        elementwise_affine: have gains.
        device: where the parameters live.
        dtype: of the parameters.
        gate: the model's shared gate; None makes one of this layer's own.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | None = None,
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self._init_taper(NormKind(tuple(self.normalized_shape), False, 0.0, self.eps), gate)


class TaperLayerNorm(TaperNorm, nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm` (same constructor words, loads its state dict).

    Args:
        normalized_shape: the trailing shape that is normalized together.
        eps: added to the variance.
        elementwise_affine: have gains (and biases).
        bias: have biases, if ``elementwise_affine``.
        device: where the parameters live.
        dtype: of the parameters.
        gate: the model's shared gate; None makes one of this layer's own.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | None = None,
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._init_taper(NormKind(tuple(self.normalized_shape), True, 0.0, self.eps), gate)


_TAPERED_CLASS: dict[type[nn.Module], type[TaperNorm]] = {nn.RMSNorm: TaperRMSNorm, nn.LayerNorm: TaperLayerNorm}
_OWN_CLASS: dict[type[nn.Module], type[nn.Module]] = {}  # of the classes that tapered_class made


def tapered_class(own: type[nn.Module]) -> type[TaperNorm]:
    """The subclass of :class:`TaperNorm` and of a norm's own class that the norm changes to when it is tapered."""
    if own not in _TAPERED_CLASS:
        made = type(f"Taper{own.__name__}", (TaperNorm, own), {"__doc__": f"A tapered {own.__name__}."})
        _TAPERED_CLASS[own], _OWN_CLASS[made] = made, own
    return _TAPERED_CLASS[own]


def _new_tapered(own: type[nn.Module]) -> TaperNorm:
    cls = own if issubclass(own, TaperNorm) else tapered_class(own)
    return cls.__new__(cls)


def become_tapered(norm: nn.Module, kind: NormKind, gate: Gate | None, device: torch.device | None) -> TaperNorm:
    """Turn a norm into a TaperNorm in place: the instance, its parameters, hooks and names stay, its class changes.

    Args:
        norm: of any class whose forward computes what ``kind`` says.
        kind: what it computes.
        gate: the model's gate; None makes one of this layer's own.
        device: where the statistics live if the norm has no parameters.
    """
    norm.__class__ = tapered_class(type(norm))
    tapered = cast(TaperNorm, norm)
    tapered._init_taper(kind, gate, device)
    return tapered


class Affine(nn.Module):
    """The linear phase as a module of its own, for a norm that cannot be folded: no statistic, no root, no gate.

    Args:
        shape: the trailing shape that it maps.
        centred: subtract the mean over that shape first (the LayerNorm kind).
        bias: have one.
        device: where the parameters live.
        dtype: of the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        centred: bool,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Make it the identity (but for the centring)."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., *shape) to the same shape."""
        if self.centred:
            x = x - x.mean(tuple(range(-self.weight.dim(), 0)), keepdim=True)
        y = x * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@torch.no_grad()
def update_alignment(
    norms: Iterable[TaperNorm],
    all_reduce_mean: Callable[[Tensor], Tensor] = lambda x: x,
    ema_rate: float = 0.01,
) -> None:
    """Take the pending micro-batches of one optimizer step into every norm's moving averages, and clear them.

    A step whose statistics are not finite, on any rank, is left out.

    Args:
        norms: the tapered norms, in the same order on every rank.
        all_reduce_mean: averages an (n, 3) tensor, a row per scalar, over the ranks. Moving averages are linear, so
            averaging each step's batch statistics keeps every rank at what one process that saw all batches would have.
        ema_rate: of the moving averages; about the last ``1 / ema_rate`` steps count.
    """
    statistics = [(pending, ema) for norm in norms for pending, ema, _ in norm._statistics()]
    if not statistics:
        return
    pending = torch.stack([sums for sums, _ in statistics])  # (n, 3)
    ran = (pending[:, 2:] > 0).float()
    mean = all_reduce_mean(torch.cat((pending[:, :2] / pending[:, 2:].clamp(min=1), ran), 1))
    batch = mean / mean[:, 2:]  # over the ranks where the norm ran
    good = batch.isfinite().all(1, keepdim=True)
    for (sums, ema), values, counts in zip(statistics, batch.where(good, 0.0), good.squeeze(1), strict=True):
        ema.lerp_(values, counts * ema_rate)
        sums.zero_()


def set_alignment_fit(model: nn.Module, fit: AlignmentFit) -> None:
    """Choose what the alignment scalars of a model's TaperNorms are fitted to, before their statistics begin.

    Example::

        set_alignment_fit(model, AlignmentFit(weight="token"))

    Args:
        model: tapered.
        fit: for all of them; the paper's is ``AlignmentFit()``. It is not saved with the statistics, and those of two
            fits do not mix: a run that goes on with statistics must be given the fit that they began with.
    """
    for name, norm in tapered_norms(model).items():
        norm.alignment_fit, norm.label = fit, name


def tapered_norms(model: nn.Module) -> dict[str, TaperNorm]:
    """Every TaperNorm of a model by its (first) name, in registration order."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, TaperNorm)}


def share_gate(model: nn.Module) -> None:
    """Make all TaperNorms of a model use the first one's gate."""
    first, *others = tapered_norms(model).values()
    for norm in others:
        norm.borrow(first.gate)


def shared_gate(model: nn.Module) -> Gate | None:
    """The one gate behind a model's TaperNorms, or None where it has none.

    Raises:
        TaperlitError: the norms do not share one gate.
    """
    norms = tapered_norms(model)
    for (first, a), (second, b) in itertools.pairwise(norms.items()):
        if a.gate is not b.gate:
            raise TaperlitError(
                f"{first} and {second} have separate gates; call taperlit.norm.share_gate on the model."
            )
    return next(iter(norms.values())).gate if norms else None
