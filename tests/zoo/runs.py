"""Ways to make the run, and states that a model may be in."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add, floats, tokens, zoo


class Block(nn.Module):
    """A pre-norm MLP beside a linear map of a second norm."""

    def __init__(self, norm, dropout=0.0):
        super().__init__()
        self.norm1, self.up, self.down = norm(D), nn.Linear(D, 16), nn.Linear(16, D)
        self.norm2, self.head, self.dropout = norm(D), nn.Linear(D, 6), nn.Dropout(dropout)

    def inner(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm1(x)))))

    def forward(self, x):
        return self.head(self.norm2(self.inner(x)))


def within(context):
    def run(model, x):
        with context():
            return model(x)

    return run


def run_add(name, about, run, verdict=FOLDS, **words):
    add(name, about, words.pop("build", Block), verdict, theme="runs", run=run, **words)


run_add("NoGrad", "under torch.no_grad", within(torch.no_grad))
run_add("EnableGrad", "under torch.enable_grad", within(torch.enable_grad))
run_add("InferenceMode", "under torch.inference_mode", within(torch.inference_mode))
run_add("AutocastBf16", "under autocast to bfloat16", within(lambda: torch.autocast("cpu", torch.bfloat16)))
run_add(
    "AutocastDecorated",
    "forward itself enters autocast",
    lambda model, x: model(x),
    tolerance=0.05,
    build=lambda norm: type("Autocast", (Block,), {"forward": autocast_forward})(norm),
)
run_add("AnomalyDetection", "under autograd's anomaly detection", within(torch.autograd.detect_anomaly))
run_add("Backward", "the run calls backward", lambda model, x: model(x).square().sum().backward(), EITHER)
run_add("Twice", "the run calls the model twice", lambda model, x: [model(x), model(x.flip(1))])
run_add("OwnMethod", "the run calls a method, not forward", lambda model, x: model.head(model.norm2(model.inner(x))))
run_add("Part", "the run calls a part of the model", lambda model, x: model.inner(x), REFUSED, why="did not run")
run_add("ReturnsNothing", "the run returns nothing", lambda model, x: [model(x), None][1], EITHER)
run_add("ReturnsText", "the run returns text", lambda model, x: str(tuple(model(x).shape)), EITHER)
run_add("ReturnsNumber", "the run returns a Python float", lambda model, x: model(x).sum().item(), EITHER)
run_add("RunsNothing", "the run does not call the model", lambda model, x: x, REFUSED, why="did not run")
run_add(
    "RunOfACopy",
    "the run calls another model",
    lambda model, x: Block(nn.RMSNorm).to(x.dtype)(x),
    REFUSED,
    why="did not run",
)


def autocast_forward(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return Block.forward(self, x)


class OwnError(Exception):
    """The run's own."""


def raises(model, x):
    model(x)
    raise OwnError("the run failed")


run_add("Raises", "the run raises after the model ran", raises, REFUSED, raises=(OwnError,))


class RaisesInside(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if y.shape[1] > 5 else y.view(-1, 7, 9)


run_add(
    "RaisesInside",
    "forward raises on the run's input",
    lambda model, x: model(x),
    REFUSED,
    build=RaisesInside,
    raises=(RuntimeError,),
    call=lambda model, x: x,
)


class RaisesUnlessFirst(Block):
    """Works once, and not again."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            raise OwnError("called again")
        return super().forward(x)


run_add(
    "RaisesSecondTime",
    "forward works once and raises when called again",
    lambda model, x: model(x),
    REFUSED,
    why=".",
    whole=True,
    build=RaisesUnlessFirst,
    raises=(OwnError,),
    call=lambda model, x: Block.forward(model, x),
)


class Frozen(Block):
    """Frozen, with gradients off in forward."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


run_add("NoGradForward", "forward is decorated with no_grad", lambda model, x: model(x), build=Frozen)
run_add("TrainingMode", "left in training mode", lambda model, x: model(x), train=True)
run_add(
    "TrainingModeDropout",
    "left in training mode with dropout",
    lambda model, x: model(x),
    train=True,
    build=lambda norm: Block(norm, 0.5),
)


class BatchNormed(Block):
    def __init__(self, norm):
        super().__init__(norm)
        self.batch = nn.BatchNorm1d(D)

    def inner(self, x):
        return self.batch(super().inner(x).mT).mT


run_add("BatchNorm", "a BatchNorm elsewhere, in eval mode", lambda model, x: model(x), build=BatchNormed)
run_add(
    "BatchNormTraining",
    "a BatchNorm elsewhere, in training mode",
    lambda model, x: model(x),
    build=BatchNormed,
    train=True,
)


class Checkpointed(Block):
    reentrant = False

    def forward(self, x):
        x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(self.norm2(x))


class CheckpointedReentrant(Checkpointed):
    reentrant = True

    def forward(self, x):
        return super().forward(x.detach().requires_grad_())


run_add("Checkpointed", "an activation checkpoint", lambda model, x: model(x), build=Checkpointed)
run_add("CheckpointedReentrant", "a reentrant checkpoint", lambda model, x: model(x), build=CheckpointedReentrant)


class CompiledPart(Block):
    def __init__(self, norm):
        super().__init__(norm)
        self.compiled = torch.compile(self.inner, backend="eager")

    def forward(self, x):
        return self.head(self.norm2(self.compiled(x)))


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


FIXED = (floats(2, 5, D),)
run_add(
    "Compiled",
    "torch.compile(model) is folded",
    lambda model, x: model(x),
    prepare=lambda model: torch.compile(model, backend="eager"),
    inputs=FIXED,
    dtypes=(torch.float64,),
)
run_add(
    "CompiledInPlace",
    "model.compile()",
    lambda model, x: model(x),
    prepare=compiled_in_place,
    inputs=FIXED,
    dtypes=(torch.float64,),
)
run_add(
    "CompiledPart",
    "a part is compiled",
    lambda model, x: model(x),
    build=CompiledPart,
    inputs=FIXED,
    dtypes=(torch.float64,),
)


class Wrapped(nn.Module):
    """As DDP and Lightning wrap: the model as ``module``, its outputs in a dict."""

    def __init__(self, norm):
        super().__init__()
        self.module = Block(norm)

    def forward(self, *inputs, **words):
        return {"logits": self.module(*inputs, **words)}


run_add("Wrapped", "the model inside another module", lambda model, x: model(x=x), build=Wrapped)
run_add("DataParallel", "nn.DataParallel", lambda model, x: model(x), build=lambda norm: nn.DataParallel(Block(norm)))


class OwnCall(Block):
    """Overrides ``__call__``."""

    def __call__(self, x):
        return self.forward(x) * 2


run_add("OwnCall", "__call__ is overridden", lambda model, x: model(x), build=OwnCall)


class Slotted(Block):
    """Forbids setting attributes from outside after it was made."""

    def __init__(self, norm):
        super().__init__(norm)
        self.closed = True

    def __setattr__(self, name, value):
        if self.__dict__.get("closed") and not isinstance(value, nn.Module | torch.Tensor | bool):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)


run_add("ClosedModule", "a model that forbids new attributes", lambda model, x: model(x), build=Slotted)


class Uncopyable(Block):
    """Refuses to be copied, as models that hold locks and files do."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be pickled")


run_add("Uncopyable", "a model that cannot be copied", lambda model, x: model(x), build=Uncopyable)


class Doubling(Block):
    """Checks that its input has the dtype of its weights, as fused kernels do."""

    def forward(self, x):
        if x.dtype != self.up.weight.dtype:
            raise TypeError(f"expected {self.up.weight.dtype}, got {x.dtype}")
        return super().forward(x)


run_add("ChecksDtype", "forward checks its input's dtype", lambda model, x: model(x), build=Doubling)

HALF = (torch.float32,)


class Float32Inside(Block):
    """Makes float32 tensors of its own and adds to them."""

    def forward(self, x):
        out = torch.zeros(*x.shape[:-1], 6, dtype=torch.float32)
        index = torch.arange(x.shape[0])
        return out.index_add_(0, index, super().forward(x))


class CastsToFloat32(Block):
    def forward(self, x):
        return super().forward(x.float())


class BufferFloat32(Block):
    def __init__(self, norm):
        super().__init__(norm)
        self.table = [torch.linspace(-1, 1, D)]

    def forward(self, x):
        return self.head(self.norm2(self.inner(x))) + torch.dot(self.table[0], x[0, 0])


run_add("Float32Inside", "makes float32 tensors in forward", lambda m, x: m(x), build=Float32Inside, dtypes=HALF)
run_add("CastsToFloat32", "casts its input to float32", lambda m, x: m(x), build=CastsToFloat32, dtypes=HALF)
run_add("KeepsFloat32", "keeps a float32 tensor in a list", lambda m, x: m(x), build=BufferFloat32, dtypes=HALF)


class MixedDtypes(Block):
    """The head is float64 in a float32 model."""

    def __init__(self, norm):
        super().__init__(norm)
        self.last = [nn.Linear(6, 2)]

    def forward(self, x):
        return super().forward(x).double().square().float()


run_add("MixedDtypes", "float64 between float32", lambda m, x: m(x), build=MixedDtypes, dtypes=HALF)


class Bf16Block(Block):
    """Its second half is bfloat16."""

    def __init__(self, norm):
        super().__init__(norm)
        self.tail = nn.Linear(6, 4).bfloat16()

    def forward(self, x):
        return self.tail(super().forward(x).bfloat16())


run_add("Bf16Tail", "a bfloat16 layer at the end", lambda m, x: m(x), EITHER, build=Bf16Block, dtypes=HALF)


@zoo("an empty batch", EITHER, sizes=[{"B": 0, "T": 5}, {"B": 2, "T": 5}, {"B": 3, "T": 7}, {"B": 1, "T": 6}])
class EmptyBatch(Block):
    pass


@zoo("no tokens", EITHER, sizes=[{"B": 2, "T": 0}, {"B": 2, "T": 5}, {"B": 3, "T": 7}, {"B": 1, "T": 6}])
class NoTokens(Block):
    pass


@zoo("one sample of one token", FOLDS, sizes=[{"B": 1, "T": 1}, {"B": 2, "T": 5}, {"B": 3, "T": 7}, {"B": 1, "T": 6}])
class OneToken(Block):
    pass


run_add("AllZeros", "the run's input is all zeros", lambda model, x: model(x * 0))
run_add("NaNInput", "the run's input is not finite", lambda model, x: model(x * float("nan")), EITHER)
run_add("HugeInput", "the run's input is huge", lambda model, x: model(x * 1e9))
run_add("InputGradient", "the run's input wants a gradient", lambda model, x: model(x.detach().requires_grad_()))
run_add("NonContiguous", "the run's input is not contiguous", lambda model, x: model(x.mT.contiguous().mT))


@zoo("the forces of an energy: a gradient inside forward", EITHER)
class Forces(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.up, self.down = nn.Linear(D, 16), nn.Linear(16, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.down(self.up(self.norm(x)).tanh()).sum()
            return -torch.autograd.grad(energy, x)[0]


@zoo("a Jacobian by torch.func inside forward", EITHER, why=".", inputs=(floats("B", D),))
class Jacobian(Forces):
    def forward(self, x):
        return torch.func.vmap(torch.func.jacrev(lambda row: self.up(self.norm(row)).tanh()))(x)


@zoo("embedding on ids; the run is the training loss with labels", FOLDS, inputs=(tokens("B", "T"), tokens("B", "T")))
class WithLabels(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.embedding, self.head = nn.Embedding(12, D), nn.Linear(D, 12)

    def forward(self, ids, labels):
        logits = self.head(self.norm(self.embedding(ids)))
        return F.cross_entropy(logits.transpose(1, 2), labels)


def counted(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return model(x)


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


run_add("FlopCounter", "under torch's counter of operations", counted)
run_add("DeviceContext", "under torch.device", within(lambda: torch.device("cpu")))
run_add("SavedOnCpu", "with activations saved on the CPU", offloaded)
run_add("Deterministic", "the run seeds torch", lambda model, x: [torch.manual_seed(0), model(x)][1])
run_add("Batched", "the run goes through the batch one by one", lambda model, x: torch.cat([model(r[None]) for r in x]))
run_add("Generator", "the run collects a list", lambda model, x: [model(row[None]) for row in x])
