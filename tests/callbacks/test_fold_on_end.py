"""FoldOnEnd on models of every habit: tried before the first step, folded at the end, and never at the run's cost."""

import copy
import dataclasses
import threading
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toy import Stop, Toy, fit, rows, same, state_of
from transformers.utils import ModelOutput

import taperlit.callbacks.fold as fold_room
from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, RunCheckpoint, ScaleAnchor, load_folded, taper
from taperlit.baselines import DyT
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms
from taperlit.training.trainer import Trainer


class Pair(Toy):
    def forward(self, x):
        y = super().forward(x)
        return y, {"twice": 2 * y}

    def loss(self, x):
        return (self(x)[0].squeeze(-1) - x.square().sum(-1)).square().mean()


@dataclasses.dataclass
class Result(ModelOutput):
    y: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


class Structured(Toy):
    def forward(self, x):
        h = self.layers(self.embed(x))
        return Result(y=self.head(h), hidden=h)

    def loss(self, x):
        return (self(x).y.squeeze(-1) - x.square().sum(-1)).square().mean()


class AsksTheTrainer(Toy):
    def forward(self, x):
        self.log("forwards", float(self.trainer.global_step))
        return super().forward(x) + 0.0 * self.trainer.max_steps


class HoldsTheRun(Toy):
    """Things that belong to the run, or that nobody can copy unless they are left alone."""

    def setup(self, stage):
        self.layers.runner = self.trainer
        self.stages = [self.trainer, self.trainer.callbacks]
        self.dataset = rows()

    def forward(self, x):
        y = super().forward(x)
        self.kept = {"last": [y]}  # of the graph, which torch refuses to copy
        assert self.layers.runner is self.stages[0]
        return y


class TwoInputs(Toy):
    def __init__(self, as_dict=False, **options):
        super().__init__(**options)
        x = torch.randn(3, 4)
        self.example_input_array = {"x": x, "scale": torch.ones(3, 1)} if as_dict else (x, torch.ones(3, 1))

    def forward(self, x, scale):
        return super().forward(x) * scale

    def loss(self, x):
        return (self(x, torch.ones(len(x), 1)).squeeze(-1) - x.square().sum(-1)).square().mean()


class ByKeyword(TwoInputs):
    def __init__(self, **options):
        super().__init__(as_dict=True, **options)


class MakesConstants(Toy):
    def forward(self, x):
        return super().forward(x @ torch.eye(4))  # of the default dtype: float64 while Lightning runs 64-true


def callbacks(path, **options):
    return [GateSchedule(3, 8), AlignmentFreeze(), FoldOnEnd(str(path), **options)]


def outputs(model, *inputs):
    with torch.no_grad():
        result = model.eval()(*inputs)
    result = result[0] if isinstance(result, tuple) else getattr(result, "y", result)
    return result.double()


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [Pair, Structured, HoldsTheRun, TwoInputs, ByKeyword, MakesConstants])
def test_models_of_every_habit(tmp_path, kind, precision):
    model = kind()
    if precision == "64-true":
        model.double()
    fit(tmp_path, model, *callbacks(tmp_path / "folded"), precision=precision)
    folded = load_folded(tmp_path / "folded", build=lambda: kind(tapered=False))
    assert not tapered_norms(folded)
    x = rows()[:5]
    inputs = (x, torch.ones(5, 1)) if isinstance(model, TwoInputs) else (x,)
    torch.set_default_dtype(torch.float64)
    try:
        inputs = [value.double() for value in inputs]
        model.layers.runner = folded.layers.runner = model.stages[0] if kind is HoldsTheRun else None
        folded.stages = getattr(model, "stages", None)
        mine, theirs = (outputs(each.double(), *inputs) for each in (model, folded))
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_forward_that_asks_the_trainer_and_logs(tmp_path):
    fit(tmp_path, AsksTheTrainer(), *callbacks(tmp_path / "folded"))
    assert (tmp_path / "folded" / "config.json").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_submodules_are_written_as_the_plain_ones(tmp_path, whole):
    class Compiled(Toy):
        def __init__(self):
            super().__init__()
            if whole:
                self.layers = torch.compile(self.layers, backend="eager")
            else:
                self.layers[0] = torch.compile(self.layers[0], backend="eager")
                self.layers[1].compile(backend="eager")

    model = Compiled()
    fit(tmp_path, model, *callbacks(tmp_path / "folded"))
    folded = load_folded(tmp_path / "folded", build=lambda: renamed(Toy(tapered=False), "Compiled"))
    torch.testing.assert_close(outputs(folded, rows()), outputs(model, rows()), rtol=1e-5, atol=1e-6)


def renamed(model, name):
    """The plain model under the name of the class that was written."""
    model.__class__ = type(name, (type(model),), {})
    return model


def test_a_submodule_is_written_under_its_own_names(tmp_path):
    class Inside(Toy):
        def __init__(self):
            super().__init__(tapered=False)
            taper(self.layers)
            self.spare = nn.Linear(2, 2)  # which forward does not use; it is not what is folded

    model = Inside()
    fit(tmp_path, model, *callbacks(tmp_path / "folded", module="layers"))
    folded = load_folded(tmp_path / "folded", build=lambda: Toy(tapered=False).layers)
    h = model.embed(rows())
    with torch.no_grad():
        torch.testing.assert_close(folded(h), model.layers.eval()(h), rtol=1e-5, atol=1e-6)


def test_parameters_that_forward_does_not_use_are_named_or_excused(tmp_path):
    class Spare(Toy):
        def __init__(self, **options):
            super().__init__(**options)
            self.spare = nn.Linear(2, 2)

    model = Spare()
    with pytest.raises(TaperlitError, match=r"used spare\.weight, spare\.bias nowhere.* untouched="):
        fit(tmp_path, model, *callbacks(tmp_path / "folded"))
    assert model.gates == []
    fit(tmp_path, Spare(), *callbacks(tmp_path / "folded", untouched=["spare.*"]))
    assert load_folded(tmp_path / "folded", build=lambda: Spare(tapered=False))


class Unfoldable(Toy):
    def forward(self, x):
        return self.head(self.layers[1].norm(self.layers(self.embed(x))).sigmoid())


class Breaks(Toy):
    def forward(self, x):
        return super().forward(x if self.training else x[:, :3])


class CannotBeCopied(Toy):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unfoldable, r"layers\.1\.norm feeds something that is not a linear map"),
        (Breaks, ".*RuntimeError: mat1 and mat2 shapes"),
        (CannotBeCopied, "TypeError: cannot pickle"),
    ],
)
def test_a_model_that_cannot_fold_is_known_before_the_first_step(tmp_path, kind, words):
    model = kind()
    before = state_of(model)
    with pytest.raises(TaperlitError, match=f"could not be folded at the end: {words}.* Leave FoldOnEnd out") as error:
        fit(tmp_path, model, *callbacks(tmp_path / "folded"))
    assert "\n" not in str(error.value)
    assert model.gates == []
    assert same(before, state_of(model))
    fit(tmp_path, model, GateSchedule(3, 8), AlignmentFreeze())  # as it advises
    assert len(model.gates) == 12


def test_a_layer_that_is_never_linear_is_refused_by_name(tmp_path):
    model = Toy()
    model.layers[1].norm = DyT((8,))
    with pytest.raises(TaperlitError, match=r"layers\.1\.norm is a DyT, whose tanh stays"):
        fit(tmp_path, model, *callbacks(tmp_path / "folded"))
    assert model.gates == []


@pytest.mark.parametrize("at", [None, 4])  # from the start, and resumed in the taper
def test_trying_the_fold_changes_nothing(tmp_path, at):
    class Noisy(Toy):
        def loss(self, x):
            return super().loss(nn.functional.dropout(x, 0.1))

    models = Noisy(), Noisy()
    for model, extra in zip(models, ([FoldOnEnd(str(tmp_path / "folded"))], []), strict=True):
        run = [GateSchedule(3, 8), AlignmentFreeze(), ScaleAnchor("head"), *extra]
        path = None
        if at:
            fit(tmp_path, Noisy(), *run, Stop(at)).save_checkpoint(path := tmp_path / "mid.ckpt")
        torch.manual_seed(3)
        fit(tmp_path, model, *run, ckpt_path=path)
    assert same(*map(state_of, models))
    assert models[0].example_input_array.shape == (3, 4)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("out of memory"), TaperlitError("x")])
@pytest.mark.parametrize("room", ["fold", "write_folded"])
def test_whatever_fails_at_the_end_is_a_warning_and_the_last_checkpoint_is_there(tmp_path, monkeypatch, error, room):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(fold_room, room, fails)
    keep = RunCheckpoint(dirpath=tmp_path / "kept", monitor=None)
    model = Toy()
    with pytest.warns(UserWarning, match=r"Not folded: .* fold them later with taperlit.fold\(model, run\)"):
        fit(tmp_path, model, *callbacks(tmp_path / "folded"), keep, kind=Trainer, enable_checkpointing=True)
    saved = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    assert same(saved["state_dict"], state_of(model))


def test_a_model_that_breaks_on_the_way_keeps_its_checkpoint_too(tmp_path):
    class BreaksLater(Toy):
        def forward(self, x):
            return super().forward(x if self.training or not self.gates else x[:, :3])

    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True, every_n_train_steps=4)
    with pytest.warns(UserWarning, match="Not folded: RuntimeError: mat1 and mat2"):
        fit(tmp_path, BreaksLater(), *callbacks(tmp_path / "folded"), keep, enable_checkpointing=True)
    assert torch.load(tmp_path / "kept/last.ckpt", weights_only=True)["global_step"] == 12


def test_the_trained_model_stays_tapered_and_whole(tmp_path):
    model, plain = Toy(), Toy()
    fit(tmp_path, model, *callbacks(tmp_path / "folded"))
    fit(tmp_path, plain, GateSchedule(3, 8), AlignmentFreeze())
    assert same(state_of(model), state_of(plain))
    assert len(tapered_norms(model)) == 2


def test_a_copy_of_the_copy_is_not_kept(tmp_path):
    copies = []

    class Counted(Toy):
        def __deepcopy__(self, memo):
            clone = self.__class__.__new__(self.__class__)
            memo[id(self)] = clone
            clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
            copies.append(weakref.ref(clone))
            return clone

        def training_step(self, batch, batch_idx):
            assert [each() for each in copies] == [None]
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Counted(), *callbacks(tmp_path / "folded"))
    assert len(copies) == 2
