#!/usr/bin/env python3
"""Compare what the alignment scalars of a pretrained model may be fitted to, by the loss when its norms go.

    tools/compare_alignment.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out docs/results/alignment_fits.md

Every norm in the blocks is tapered (or those of --first-block and --only), the final one stays. First without training:
the scalars are fitted at g = 1, and the held-out loss is taken at lower gates. Then short tapers by AdamW: the
statistics are gathered while g = 1, the gate closes along a cosine, and training goes on at g = 0. Every variant has
the same steps, data, order and learning rates. The text is the Python standard library's source. Results go to --out,
as Markdown, as they come.
"""

import argparse
import copy
import fnmatch
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from massive_activations import load, provenance, python_blocks
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.norm import AlignmentFit, TaperNorm, set_alignment_fit, shared_gate, tapered_norms, update_alignment
from taperlit.schedule import gate_at, warmup_cosine
from taperlit.surgery import known_norms, separate_first, taper


@dataclass
class Variant:
    """One way to fit.

    Args:
        fit: of the scalars.
        first: position 0 has a scalar of its own until after the gate has closed.
        tapers: False trains on with the norms, for reference.
    """

    fit: AlignmentFit
    first: bool = False
    tapers: bool = True


VARIANTS = {
    "norms kept": Variant(AlignmentFit(), tapers=False),
    "energy": Variant(AlignmentFit("energy")),
    "energy, skip 1": Variant(AlignmentFit("energy", 1)),
    "token": Variant(AlignmentFit("token")),
    "token, skip 1": Variant(AlignmentFit("token", 1)),
    "energy, first apart": Variant(AlignmentFit("energy"), first=True),
    "token, first apart": Variant(AlignmentFit("token"), first=True),
}
LINEAR_IN_THE_STATISTICS = {
    # c by other means over all tokens but the first, which could be gathered as moving averages too.
    "1 / E[r], skip 1": lambda r: 1 / r.mean(),
    "exp E[log 1/r], skip 1": lambda r: (-r.log().mean()).exp(),
}
GATES = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5, 0.0)


def half() -> AbstractContextManager[Any]:
    """bfloat16 products."""
    return torch.autocast("cpu", torch.bfloat16)


def token_losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """(B, T) float32 next-token losses of (B, T + 1) blocks."""
    with half():
        logits = model(blocks[:, :-1])
    return F.cross_entropy(logits.float().transpose(1, 2), blocks[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Tensor) -> Tensor:
    """The losses of all held-out tokens, (N, T) float32, in eval mode."""
    training = model.training
    losses = torch.cat([token_losses(model.eval(), batch) for batch in blocks.split(2)])
    model.train(training)
    return losses


@dataclass
class Where:
    """Which norms are tapered: of the blocks from ``first_block`` on, those whose name matches a pattern."""

    first_block: int
    only: str

    def taper(self, model: nn.Module) -> dict[str, TaperNorm]:
        """Taper them in place; the TaperNorms by name."""
        blocks = list(model.blocks)[self.first_block :]  # type: ignore[arg-type]
        inside = {module for block in blocks for module in block.modules()}
        known = [name for name in known_norms(model) if model.get_submodule(name) in inside]
        taper(model, fnmatch.filter(known, self.only))
        return tapered_norms(model)


def fitted(plain: nn.Module, where: Where, variant: Variant, blocks: Tensor) -> nn.Module:
    """A tapered copy whose scalars are fitted to some blocks without training."""
    model = copy.deepcopy(plain).train()
    norms = where.taper(model)
    set_alignment_fit(model, variant.fit)
    if variant.first:
        separate_first(model)
    for batch in blocks.split(2):
        with torch.enable_grad():  # where statistics are gathered
            token_losses(model, batch)
    update_alignment(norms.values(), ema_rate=1.0)
    for norm in norms.values():
        norm.freeze()
    return model.eval()


def refitted(model: nn.Module, mean: Callable[[Tensor], Tensor], blocks: Tensor) -> nn.Module:
    """A fitted model with other scalars, of the denominators ``r`` of all tokens but each sequence's first."""
    norms = tapered_norms(model)
    gate = shared_gate(model)
    assert gate is not None
    gate.set(1.0)
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}

    def note(norm: TaperNorm, name: str, x: Tensor) -> None:
        seen[name].append(norm._denominator(norm._centre(x.detach().float()))[:, 1:].double())

    hooks = [
        norm.register_forward_pre_hook(lambda module, args, name=name: note(module, name, args[0]))
        for name, norm in norms.items()
    ]
    evaluate(model, blocks)
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        norm.alignment.fill_(mean(torch.cat(seen[name])).item())
    return model


def zero_shot(
    plain: nn.Module, where: Where, names: list[str], means: bool, fit_on: Tensor, held_out: Tensor
) -> dict[str, list[float]]:
    """The held-out loss at each of :data:`GATES`, without any training, up to the first that is not finite."""
    rows: dict[str, list[float]] = {}

    def measure(name: str, model: nn.Module) -> None:
        gate = shared_gate(model)
        assert gate is not None
        rows[name] = []
        for g in GATES:
            gate.set(g)
            rows[name].append(evaluate(model, held_out).mean().item())
            if not math.isfinite(rows[name][-1]):
                break
        print(name, [f"{loss:.3f}" for loss in rows[name]], file=sys.stderr, flush=True)

    for name in names:
        if VARIANTS[name].tapers:
            measure(name, fitted(plain, where, VARIANTS[name], fit_on))
    for name, mean in LINEAR_IN_THE_STATISTICS.items() if means else ():
        measure(name, refitted(fitted(plain, where, VARIANTS["energy"], fit_on), mean, fit_on))
    return rows


SHARES = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5, 0.0)


def by_share(plain: nn.Module, where: Where, fit_on: Tensor, held_out: Tensor) -> dict[str, list[float]]:
    """The held-out loss at g = 0.5 while position 0's scalar goes to the others' by one mean or another."""
    model = fitted(plain, where, VARIANTS["energy, first apart"], fit_on)
    norms, gate = tapered_norms(model), shared_gate(model)
    assert gate is not None
    gate.set(0.5)
    rows: dict[str, list[float]] = {"geometric": [], "arithmetic": []}
    for s in SHARES:
        gate.set_first(s)
        rows["geometric"].append(evaluate(model, held_out).mean().item())
    first = {name: cast(Tensor, norm.first_alignment).clone() for name, norm in norms.items()}
    gate.set_first(1.0)
    for s in SHARES:
        for name, norm in norms.items():
            cast(Tensor, norm.first_alignment).copy_(torch.lerp(norm.alignment, first[name], s))
        rows["arithmetic"].append(evaluate(model, held_out).mean().item())
    return rows


@dataclass
class Outcome:
    """What a taper led to.

    Args:
        evaluated: (N, T) held-out token losses ``before`` the gate moves, when it is first at or under ``half``, when
            it has ``closed``, and at the ``end``; as far as it went.
        train: the loss of each step.
        lost: where the loss was not finite or hopeless, in words; None where it went to the end.
        seconds: in all.
    """

    evaluated: dict[str, Tensor]
    train: list[float]
    lost: str | None
    seconds: float


def train(plain: nn.Module, variant: Variant, data: Tensor, held_out: Tensor, args: argparse.Namespace) -> Outcome:
    """Taper once.

    Args:
        plain: copied.
        variant: how.
        data: (steps, batch, T + 1) blocks.
        held_out: (N, T + 1) blocks.
        args: of the command.
    """
    started = time.monotonic()
    model = copy.deepcopy(plain).train()
    norms = Where(args.first_block, args.only).taper(model)
    gate = shared_gate(model)
    assert gate is not None
    set_alignment_fit(model, variant.fit)
    if variant.first:
        separate_first(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    seen: dict[str, Tensor] = {}
    lost = None
    for step in range(1, len(data) + 1):
        if step == args.warmup + 1:
            seen["before"] = evaluate(model, held_out)
            for norm in norms.values():
                norm.freeze()
        if variant.tapers:
            gate.set(gate_at(step, args.warmup, args.closed))
            gate.set_first(gate_at(step, args.closed, args.first_end) if variant.first else 0.0)
        if gate.value <= 0.5 and "half" not in seen:
            seen["half"] = evaluate(model, held_out)
        if step == args.closed:
            seen["closed"] = evaluate(model, held_out)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup_cosine(step - 1, args.warmup, len(data), 0.1)
        loss = token_losses(model, data[step - 1]).mean()
        losses.append(loss.item())
        if not losses[-1] < 20:
            s = "" if gate.first is None else f", s = {gate.first.item():.2f}"
            lost = f"lost at step {step}, g = {gate.value.item():.2f}{s}"
            break
        loss.backward()
        update_alignment(norms.values())
        for norm in norms.values():
            for parameter in norm.idle_parameters():
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    else:
        seen["end"] = evaluate(model, held_out)
    return Outcome(seen, losses, lost, time.monotonic() - started)


def trained_row(name: str, outcome: Outcome) -> str:
    """A row of the second table."""
    cells = [f"{outcome.evaluated['before'].mean():.3f}"]
    cells.append(f"{outcome.evaluated['half'].mean():.3f}" if "half" in outcome.evaluated else "")
    for when in ("closed", "end"):
        flat = outcome.evaluated.get(when, torch.empty(0)).flatten().double()
        numbers = [flat.mean(), flat.quantile(0.999), flat.max()] if flat.numel() else []
        cells += [f"{number.item():.3f}" for number in numbers] or [""] * 3
    end = outcome.evaluated.get("end")
    cells += ["" if end is None else f"{end[:, 0].mean():.2f}", outcome.lost or f"{max(outcome.train):.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Run both comparisons and write the tables as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name, folder, .gguf file, or a plain checkpoint of ours")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=6, help="last step at g = 1, and of the learning rate's warm-up")
    parser.add_argument("--closed", type=int, default=22, help="first step at g = 0")
    parser.add_argument("--first-end", type=int, default=34, help="first step without a scalar for position 0")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--fit-sequences", type=int, default=8, help="that the scalars are fitted to without training")
    parser.add_argument("--held-out", type=int, default=8, help="sequences of the held-out loss")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-block", type=int, default=0, help="leave the norms of the blocks before it")
    parser.add_argument("--only", default="*", help="taper the norms whose names match this pattern")
    parser.add_argument("--other-means", action="store_true", help="try the fits that are not offered too")
    parser.add_argument("--parts", nargs="+", default=["zero-shot", "train"], choices=["zero-shot", "shares", "train"])
    parser.add_argument("--out", type=Path, help="write the tables there too")
    parser.add_argument("--append", action="store_true", help="to what --out holds already")
    args = parser.parse_args()
    if not 0 < args.warmup < args.closed < args.first_end <= args.steps:
        sys.exit("compare_alignment.py: --warmup, --closed, --first-end and --steps must rise.")
    model, tokenizer_json, _ = load(args.model)
    count = args.held_out + args.fit_sequences + args.steps * args.batch
    held_out, fit_on, data = python_blocks(tokenizer_json, count, args.length + 1, args.seed).split(
        [args.held_out, args.fit_sequences, args.steps * args.batch]
    )
    before = args.out.read_text() + "\n" if args.append else ""
    lines = [] if args.append else [f"# What the alignment scalars are fitted to: {Path(args.model).name}", ""]
    where = Where(args.first_block, args.only)
    which = f"Norms {args.only} of blocks {where.first_block} to {len(model.blocks) - 1}. "  # type: ignore[arg-type]

    def say(*more: str) -> None:
        lines.extend(more)
        text = before + "\n".join([*lines, "", provenance()])
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text)

    if "zero-shot" in args.parts:
        rows = zero_shot(model, where, args.variants, args.other_means, fit_on, held_out)
        say(
            f"{which}Without training: held-out loss (nats per token, {args.held_out} x {args.length} tokens) after "
            f"the scalars are fitted to {args.fit_sequences} x {args.length} others. `first apart` is at s = 1; nan is "
            "an overflow, where a row ends.",
            "",
            f"| fit | {' | '.join(f'g = {g:g}' for g in GATES)} |",
            "|---" + "|---:" * len(GATES) + "|",
            *(
                f"| {name} | {' | '.join([f'{loss:.3f}' for loss in losses] + [''] * (len(GATES) - len(losses)))} |"
                for name, losses in rows.items()
            ),
            "",
        )
    if "shares" in args.parts:
        say(
            f"{which}Without training, `energy, first apart` at g = 0.5: held-out loss as the first position's scalar "
            "goes from its own (s = 1) to the others' (s = 0), by c_first^s c^(1 - s) and by s c_first + (1 - s) c.",
            "",
            f"| mean | {' | '.join(f's = {s:g}' for s in SHARES)} |",
            "|---" + "|---:" * len(SHARES) + "|",
            *(
                f"| {name} | {' | '.join(f'{loss:.3f}' for loss in losses)} |"
                for name, losses in by_share(model, where, fit_on, held_out).items()
            ),
            "",
        )
    if "train" not in args.parts:
        print("\n".join([*lines, "", provenance()]))
        return
    say(
        f"{which}Training: {args.steps} steps of {args.batch} x {args.length} tokens, AdamW, learning rate "
        f"{args.lr:g} (warm-up, then cosine), bfloat16 autocast: g = 1 to step {args.warmup}, 0 from step "
        f"{args.closed}; a scalar of the first position is gone from step {args.first_end}. `closed` is before the "
        "first step at g = 0. A run ends where its loss is not finite, or above 20.",
        "",
        "| fit | g = 1 | g = 0.5 | closed: mean | 99.9% | largest | end: mean | 99.9% | largest | end: position 0 "
        "| largest training loss |",
        "|---" + "|---:" * 10 + "|",
    )
    for name in args.variants:
        try:
            outcome = train(model, VARIANTS[name], data.view(args.steps, args.batch, -1), held_out, args)
        except TaperlitError as error:
            sys.exit(f"compare_alignment.py: {name}: {error}")
        say(trained_row(name, outcome))
        print(lines[-1], f"{outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        print([round(loss, 3) for loss in outcome.train], file=sys.stderr, flush=True)
    print("\n".join([*lines, "", provenance()]))


if __name__ == "__main__":
    main()
