"""TailPenalty by its formula in float64, beside everything that it must not touch."""

import csv

import lightning as L
import pytest
import torch
from processes import on_two
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import Stop, Toy, fit, same, state_of

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, ScaleAnchor, TailPenalty, TaperMonitor, taper
from taperlit.callbacks import RngState
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms

VOCAB, T = 40, 6
NORMS = ["net.blocks.0.norm", "net.blocks.1.norm"]


class Block(nn.Module):
    def __init__(self, norm, dropout):
        super().__init__()
        self.norm, self.up, self.down, self.drop = norm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(self.up(self.norm(x)) ** 2))


class Net(nn.Module):
    def __init__(self, norm, dropout):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.blocks = nn.ModuleList(Block(norm, dropout) for _ in range(2))
        self.checkpointing = False

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.head(x)


class Words(L.LightningModule):
    def __init__(self, norm=nn.RMSNorm, dropout=0.0, tapered=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(norm, dropout)
        if tapered:
            taper(self)
        with torch.no_grad():
            self.net.table.weight *= torch.linspace(0.3, 4, VOCAB)[:, None]  # tokens of every size
        self.example_input_array = torch.arange(T)[None]
        self.losses = []

    def forward(self, ids):
        return self.net(ids)

    def training_step(self, batch, batch_idx):
        batch = data()[batch_idx * 4 : batch_idx * 4 + 4]  # a plain loader begins again in a resumed run
        loss = nn.functional.cross_entropy(self.net(batch[:, :-1]).transpose(1, 2), batch[:, 1:])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[:, :-1]).transpose(1, 2), batch[:, 1:]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(data(), batch_size=4)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(data()[:8], batch_size=4)


def data():
    return torch.randint(VOCAB, (96, T + 1), generator=torch.Generator().manual_seed(1))


class Added(L.Callback):
    """What reaches the backward pass, beside the scales at the watched modules in float64, pass by pass."""

    def __init__(self, names=NORMS):
        self.names, self.added, self.scales, self.random, self.tokens = names, [], [], [], []

    def on_train_start(self, trainer, pl_module):
        self.handles = [
            pl_module.get_submodule(name).register_forward_pre_hook(
                lambda m, args, name=name: self.look(name, m, args[0])
            )
            for name in self.names
        ]
        self.handles.append(pl_module.net.table.register_forward_pre_hook(self.look_at_tokens))

    def on_train_batch_start(self, *_):
        self.scales.append({})
        self.random.append({})

    def look(self, name, module, h):
        if torch.is_grad_enabled():
            h = h.detach().double()
            if isinstance(module, nn.LayerNorm):
                h = h - h.mean(-1, keepdim=True)
            (self.scales if module.training else self.random)[-1][name] = h.square().mean(-1).sqrt()

    def look_at_tokens(self, module, args):
        if torch.is_grad_enabled() and not module.training:
            self.tokens.append(args[0].clone())

    def on_before_backward(self, trainer, pl_module, loss):
        self.added.append(loss.item() * trainer.accumulate_grad_batches - pl_module.losses[-1])

    def on_train_end(self, trainer, pl_module):
        for handle in self.handles:
            handle.remove()


def expected(added, rate, multiple, batches_of_step, weight=1.0, start=0):
    """What should be added to each batch's loss; the second list is of random passes, for a whole step."""
    ema = {name: [0.0, 0.0] for name in added.names}
    penalties, random = [], []
    for step, batches in enumerate(batches_of_step):
        for b in batches:
            terms, extra = [], []
            for name in added.names:
                target = ema[name][0] / ema[name][1] if ema[name][1] and step >= start else float("inf")
                terms.append((added.scales[b][name] / target - multiple).relu().square().mean().item())
                if name in added.random[b]:
                    extra.append((added.random[b][name] / target - multiple).relu().square().mean().item())
            penalties.append(weight * sum(terms) / len(terms))
            random.append(weight * sum(extra) / len(extra) if extra else None)
        for name in added.names:
            mean = sum(added.scales[b][name].mean().item() for b in batches) / len(batches)
            ema[name] = [(1 - rate) * ema[name][0] + rate * mean, (1 - rate) * ema[name][1] + rate]
    return penalties, random


def gated():
    return [GateSchedule(2, 4), AlignmentFreeze()]


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize(("accumulate", "start"), [(1, 0), (2, 0), (1, 3)])
def test_what_is_added_is_the_formula(tmp_path, norm, accumulate, start):
    added = Added()
    penalty = TailPenalty(weight=0.5, multiple=1.0, ema_rate=0.3, start=start)
    fit(tmp_path, Words(norm), *gated(), penalty, added, steps=8, accumulate_grad_batches=accumulate)
    steps = [range(k * accumulate, (k + 1) * accumulate) for k in range(8)]
    wanted, _ = expected(added, 0.3, 1.0, steps, weight=0.5, start=start)
    assert added.added == pytest.approx(wanted, rel=1e-3, abs=2e-5)
    quiet = max(start, 1) * accumulate
    assert all(abs(value) < 1e-5 for value in added.added[:quiet])
    assert all(value > 1e-3 for value in wanted[quiet:])  # and so after the gate has closed, at step 4


def test_a_residual_and_named_modules_on_a_plain_model(tmp_path):
    added = Added(["net.blocks.1.norm", "net.head"])
    penalty = TailPenalty(modules=["net.blocks.1.*norm"], residual="net.head", multiple=1.5, ema_rate=0.3)
    fit(tmp_path, Words(tapered=False), penalty, added, steps=4)
    wanted, _ = expected(added, 0.3, 1.5, [[b] for b in range(4)])
    assert added.added == pytest.approx(wanted, rel=1e-3, abs=2e-5)
    assert wanted[-1] > 0.01


def test_a_final_norm_that_is_tapered_counts_once(tmp_path):
    penalty = TailPenalty(residual=NORMS[1])
    fit(tmp_path, Words(), *gated(), penalty, steps=5)
    assert list(penalty.state_dict()["ema"]) == NORMS


def test_scales_below_the_multiple_change_nothing(tmp_path):
    plain, penalized = Words(), Words()
    fit(tmp_path, plain, *gated(), steps=6)
    fit(tmp_path, penalized, *gated(), TailPenalty(multiple=1e6, random_every=1, model="net"), steps=6)
    assert same(state_of(plain), state_of(penalized))


@pytest.mark.parametrize(("random_length", "taken"), [(2, 2), (100, T)])
def test_the_random_pass_is_the_formula_on_tokens_of_its_own(tmp_path, random_length, taken):
    added = Added()
    random_options = dict(random_every=2, random_sequences=3, random_length=random_length)
    penalty = TailPenalty(multiple=1.5, ema_rate=0.3, **random_options, model="net")
    fit(tmp_path, Words(), *gated(), penalty, added, steps=7, accumulate_grad_batches=2)
    wanted, random = expected(added, 0.3, 1.5, [(2 * k, 2 * k + 1) for k in range(7)])
    assert [b for b, value in enumerate(random) if value is not None] == [
        4,
        8,
        12,
    ]  # the first batches of steps 2, 4, 6
    total = [a + 2 * (b or 0) for a, b in zip(wanted, random, strict=True)]
    assert added.added == pytest.approx(total, rel=1e-3, abs=2e-5)
    assert [tuple(tokens.shape) for tokens in added.tokens] == [(3, taken)] * 3
    assert not torch.equal(added.tokens[0], added.tokens[1])
    assert 0 <= min(t.min() for t in added.tokens) <= max(t.max() for t in added.tokens) < VOCAB
    assert max(random[b] for b in (4, 8, 12)) > 0.01


class Seen(L.Callback):
    """The generator's state and the alignment statistics after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        ema = torch.stack([norm.alignment_ema for norm in tapered_norms(pl_module).values()])
        self.seen.append((torch.get_rng_state(), ema))


def traces(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [{tag: value for tag, value in row.items() if tag.startswith("taper/")} for row in csv.DictReader(file)]


def test_the_random_pass_disturbs_nobody(tmp_path):
    """With weight 0 all but its own logs is bit by bit the run without it, dropout included."""
    runs = []
    for extra in ([], [TailPenalty(weight=0.0, multiple=1.0, random_every=1, model="net")]):
        model, seen, anchor = Words(dropout=0.3), Seen(), ScaleAnchor("net.head", weight=0.1)
        logger = L.pytorch.loggers.CSVLogger(tmp_path, f"logs{len(extra)}")
        watch = [anchor, TaperMonitor(every=1, residual="net.head", logits="net.head"), seen]
        fit(tmp_path, model, *gated(), *extra, *watch, steps=6, logger=logger, log_every_n_steps=1)
        runs.append((state_of(model), seen.seen, anchor.state_dict(), traces(logger)))
    (a, seen_a, anchor_a, traces_a), (b, seen_b, anchor_b, traces_b) = runs
    assert same(a, b)
    assert all(
        torch.equal(x, y) for one, two in zip(seen_a, seen_b, strict=True) for x, y in zip(one, two, strict=True)
    )
    assert same(anchor_a, anchor_b)
    assert [row for row in traces_a if any(row.values())] == [row for row in traces_b if any(row.values())]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, at):
    def callbacks():
        penalty = TailPenalty(multiple=1.2, ema_rate=0.3, random_every=2, model="net")
        return [*gated(), ScaleAnchor("net.head"), penalty, RngState()]

    whole, rest = Words(dropout=0.3), Words(dropout=0.3)
    half = Words(dropout=0.3)
    torch.manual_seed(5)
    fit(tmp_path, whole, *callbacks(), steps=8)
    torch.manual_seed(5)
    fit(tmp_path, half, *callbacks(), Stop(at), steps=8).save_checkpoint(tmp_path / "mid.ckpt")
    torch.manual_seed(6)
    fit(tmp_path, rest, *callbacks(), steps=8, ckpt_path=tmp_path / "mid.ckpt")
    assert same(state_of(whole), state_of(rest))


def test_validation_never_contains_it(tmp_path):
    model = Words()
    penalty = TailPenalty(multiple=1.0, weight=100.0, random_every=1, model="net")
    options = {"limit_val_batches": 1.0, "val_check_interval": 4, "num_sanity_val_steps": 1}
    run = fit(tmp_path, model, *gated(), penalty, steps=4, **options)
    with torch.no_grad():
        expected = torch.stack(
            [nn.functional.cross_entropy(model(b[:, :-1]).transpose(1, 2), b[:, 1:]) for b in data()[:8].split(4)]
        ).mean()
    assert run.callback_metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_the_model_is_given_back(tmp_path, first):
    model = Words()
    pair = [TailPenalty(residual="net.head", random_every=2, model="net"), ScaleAnchor("net.head")]
    fit(tmp_path, model, *gated(), *(pair if first else pair[::-1]), steps=5)
    assert "training_step" not in vars(model)
    for name, module in model.named_modules():
        assert "tail_watch" not in vars(module)
        if name != "net.blocks.0.norm.gate":
            assert not module._forward_pre_hooks, name

    class Fails(Words):
        def training_step(self, batch, batch_idx):
            assert batch_idx < 2
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(AssertionError):
        fit(tmp_path, model, *gated(), *(pair if first else pair[::-1]), steps=5)
    assert "training_step" not in vars(model)
    assert not any("tail_watch" in vars(module) for module in model.modules())


def test_it_goes_on_to_the_end_and_the_model_folds(tmp_path):
    model, added = Words(), Added()
    penalty = TailPenalty(multiple=1.2, random_every=2, model="net")
    fit(tmp_path, model, *gated(), penalty, FoldOnEnd(str(tmp_path / "folded")), added, steps=9)
    assert shared_gate(model).value == 0
    assert added.added[-1] > 1e-3
    assert (tmp_path / "folded/config.json").exists()


def test_checkpointed_layers_give_the_same(tmp_path):
    runs = []
    for on in (False, True):
        model, added = Words(), Added([NORMS[0]])
        model.net.checkpointing = on
        fit(tmp_path, model, *gated(), TailPenalty(multiple=1.5, random_every=2, model="net"), added, steps=6)
        runs.append((added.added, state_of(model)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4, abs=1e-5)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-4, atol=1e-6)


def test_compiled_blocks_give_the_same_and_share_their_graphs(tmp_path):
    from torch._dynamo.utils import counters

    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model, added = Words(), Added(["net.head"])
        if compiled:
            for block in model.net.blocks:
                block.compile(dynamic=False, backend="eager")
        penalty = TailPenalty(multiple=1.5, residual="net.head", random_every=2, model="net")
        fit(tmp_path, model, *gated(), penalty, added, steps=7)
        runs.append((added.added, state_of(model), counters["stats"]["unique_graphs"]))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4, abs=1e-5)
    assert min(runs[1][0][1:]) > 0.01
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-4, atol=1e-6)
    assert 1 <= runs[1][2] <= 4  # a graph per phase of the gate, and one for the first step, whose target is no view


@pytest.mark.slow
@pytest.mark.parametrize("random_every", [None, 2])
def test_two_processes(tmp_path, random_every):
    """On one process that sees both batches the penalty is the mean; each process has random tokens of its own."""
    one, two = Dealt(), Dealt()
    for model, options in ((one, {"use_distributed_sampler": False}), (two, on_two())):
        penalty = TailPenalty(multiple=1.2, ema_rate=0.3, random_every=random_every, model="net")
        fit(tmp_path, model, *gated(), penalty, steps=8, **options)
    assert state_of(two).keys() == state_of(one).keys()
    if random_every is None:
        for name, value in state_of(one).items():
            torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    else:
        assert not same(state_of(one), state_of(two))
        assert all(value.isfinite().all() for value in state_of(two).values())


class Dealt(Words):
    """Every process has its share of each batch of 8."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    def train_dataloader(self):
        share = data()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)


class ByName(Words):
    """Calls its model as transformers' are called."""

    def __init__(self):
        super().__init__()
        self.net.forward = lambda ids=None, mask=None, inner=self.net.forward: inner(ids)

    def training_step(self, batch, batch_idx):
        logits = self.net(mask=torch.ones(4, T), ids=batch[:, :-1])
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:])


def test_token_ids_by_name_and_the_whole_module_as_the_model(tmp_path):
    class Whole(Words):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    for model, name in ((ByName(), "net"), (Whole(), "")):
        logger = L.pytorch.loggers.CSVLogger(tmp_path, f"logs{name}")
        penalty = TailPenalty(multiple=1.0, random_every=1, model=name)
        fit(tmp_path, model, *gated(), penalty, steps=4, logger=logger, log_every_n_steps=1)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            logged = [
                float(row["train/tail_loss_random"]) for row in csv.DictReader(file) if row["train/tail_loss_random"]
            ]
        assert logged[0] == 0
        assert min(logged[1:]) > 0


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Toy, {"random_every": 1, "model": "layers"}, "random_every needs to know how many tokens Sequential"),
        (
            Toy, {"random_every": 1, "model": "layers", "vocab_size": 5},
            "TailPenalty.random_every needs Sequential 'layers' to be called with .B, T. token ids, first or by name",
        ),
        (Words, {"random_every": 1}, "TailPenalty finds no module 'model' in Words; its children are net"),
        (Words, {"modules": ["none*"]}, "TailPenalty.modules 'none.' matches no module of Words"),
        (Words, {"residual": "none"}, "TailPenalty finds no module 'none' in Words"),
        (Words, {"start": 1.5}, "TailPenalty.start is 1.5"),
        (lambda: Words(tapered=False), {}, "TailPenalty has nothing to watch: call taperlit.taper"),
        (Words, {"modules": ["net.blocks"]}, r"None of TailPenalty's modules \(net.blocks\) ran in training_step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, model, options, words):
    with pytest.raises(TaperlitError, match=words) as error:
        fit(tmp_path, model(), TailPenalty(**options), steps=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"weight": -1}, {"multiple": 0.5}, {"ema_rate": 0}, {"random_every": 0}, {"random_sequences": 0}]
)
def test_values_out_of_range(options):
    with pytest.raises(TaperlitError, match=rf"TailPenalty\.{next(iter(options))} is .*must be "):
        TailPenalty(**options)


def test_manual_optimization_is_refused(tmp_path):
    model = Words()
    model.automatic_optimization = False
    with pytest.raises(TaperlitError, match="manual optimization does not use"):
        fit(tmp_path, model, TailPenalty(), steps=2)


class NeverTheLast(Words):
    """Its last token explodes, and training does not have it."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net.table.weight[VOCAB - 1] = 3e38

    def training_step(self, batch, batch_idx):
        batch = batch.clamp(max=VOCAB - 2)
        return nn.functional.cross_entropy(self.net(batch[:, :-1]).transpose(1, 2), batch[:, 1:])


def test_a_random_pass_that_explodes_is_left_out_with_a_warning(tmp_path):
    model = NeverTheLast()
    penalty = TailPenalty(multiple=1.2, random_every=1, random_sequences=40, model="net")
    with pytest.warns(UserWarning, match="the scales on random tokens are not finite; TailPenalty leaves them out"):
        fit(tmp_path, model, *gated(), penalty, steps=5)
    assert all(value.isfinite().all() for value in state_of(model).values())


def test_it_holds_a_tail_down(tmp_path):
    """The largest scale over the mean at the last norm, trained with and without."""
    ratios = []
    for extra in ([], [TailPenalty(weight=30.0, multiple=1.2, random_every=1, model="net")]):
        model = Words()
        fit(tmp_path, model, *gated(), *extra, steps=72)
        seen = []
        model.net.head.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].double()))
        with torch.no_grad():
            model(torch.randint(VOCAB, (20, T), generator=torch.Generator().manual_seed(9)))
        s = seen[0].square().mean(-1).sqrt()
        ratios.append((s.max() / s.mean()).item())
    assert ratios[1] < 0.8 * ratios[0]
