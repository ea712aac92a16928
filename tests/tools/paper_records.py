"""Records of runs that were never done: the harness's own settings, and results by a formula."""

import math
import random
from typing import Any

from paper_harness.experiments import EXPERIMENTS, Options
from paper_harness.runs import _HASHES, Run, hash_of
from paper_harness.sizes import SIZES

Record = dict[str, Any]
BLOCK = "grad_norm/model.blocks"
WEIGHT_TYPES = (
    "grad_norm/model.tok_embed.weight", f"{BLOCK}.attn_norm.weight", f"{BLOCK}.attn.q_proj.weight",
    f"{BLOCK}.attn.o_proj.weight", f"{BLOCK}.mlp.down_proj.weight", "grad_norm/model.final_norm.weight",
    f"{BLOCK}.attn_norm.taper_weight",
)  # fmt: skip
SHIFTS = {
    "internal": 0.008, "internal_aux": 0.006, "all": 0.015, "all_aux": 0.011, "fakeln": 0.02, "dyt": 0.04, "derf": 0.03,
}  # fmt: skip


def gap(variant: str, length: float, seed: int) -> float:
    """The gap to the baseline that a run is given: it falls over the length, and crosses zero at 20 for one variant."""
    noise = random.Random(f"{variant} {length} {seed}").gauss(0, 0.0008)
    if variant == "baseline":
        return 0.0
    if variant == "internal_aux":
        return 0.004 * math.log10(length / 20) + noise
    return SHIFTS[variant] / length**0.3 + noise


def record(run: Run, diverged: int | None = None, **changes: Any) -> Record:
    """The record of a run.

    Args:
        run: to make it for.
        diverged: step at which it did; None is a run that arrived.
        changes: over the settings.
    """
    settings = run.settings() | changes
    steps, variant, seed = settings["steps"], settings["variant"], settings["seed"]
    length = settings["tokens_per_parameter"]
    end = steps if diverged is None else diverged
    base = 3 + 2 / length**0.2 + 0.01 * seed
    gained = 0.01 if "idea" in settings and variant != "baseline" else 0.0

    def loss(step: float) -> float:
        own = gap(variant, length, seed) - gained
        return (base + 3 * math.exp(-6 * step / steps)) * (1 + own * step / steps)

    def gate(step: float) -> float:
        at = min(1.0, max(0.0, (step / steps - 0.05) / 0.45))
        return (1 + math.cos(math.pi * at)) / 2

    every = max(1, steps // 60)
    records = range(1, end + 1, every)
    free = variant in ("all", "all_aux")
    noise = random.Random(f"{variant} {seed} traces")
    traces: dict[str, list[list[float]]] = {
        "taper/pre_logit_rms": [[s, 2 + (3 if variant == "all" else 0.3) * s / steps] for s in records],
        "taper/logit_norm": [[s, 40 + (60 if variant == "all" else 20) * s / steps] for s in records],
        "taper/radial_gradient": [
            [s, -0.02 * (1 - gate(s)) * (1 + 0.1 * noise.random()) if free else 1e-6 * noise.gauss(0, 1)]
            for s in records
        ],
    }
    if variant in ("internal", "internal_aux", "all", "all_aux"):
        traces["taper/gate"] = [[s, gate(s)] for s in records]
    for place, tag in enumerate(WEIGHT_TYPES):
        if variant != "baseline" or not tag.endswith("taper_weight"):
            factor = 1.8 if free else 1.0
            traces[tag] = [[s, factor * 0.1 * (1 + place) * (1 + 0.2 * noise.random())] for s in records]
    every = max(1, steps // 12)
    random_tokens = {"largest_rms": 4.0, "median_rms": 2.0, "ratio": 2.0, "largest_loss": 19.0}
    return {
        "settings": settings,
        "result": {
            "parameters": 216288,
            "tokens": steps * 2048,
            "val": [[s, loss(s)] for s in range(every, end + 1, every)],
            "train": [[s, loss(s) + 0.05] for s in range(1, end + 1, max(1, steps // 200))],
            "traces": traces,
            "tails": None if diverged else {"loss": loss(steps), "loss_max": 14.0 + seed, "loss_p999": 10.0},
            "random": None if diverged else dict(random_tokens, ratio=2.0 + free),
            "diverged": None if diverged is None else {"step": diverged, "gate": gate(diverged), "why": "not finite"},
        },
        "ran": {
            "seconds": 60.0, "cpu_seconds": 72.0, "date": f"2026-11-2{seed}", "machine": "a machine",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
        },
    }  # fmt: skip


def campaign(**options: Any) -> list[Record]:
    """The records of all experiments, each run once; All-Taper diverges at two seeds, quick tapers at a high rate.

    Args:
        options: of the harness, but the size.
    """
    _HASHES.setdefault(("embedded", 1024), "embedded")  # nothing is read
    found: dict[str, Record] = {}
    for name in ("pretrain", "length", "schedule", "ideas", "ours", "short"):
        for run in EXPERIMENTS[name](Options(**options, **({"size": "nano_unit"} if name == "ours" else {}))):
            made = record(run, _fate(run))
            found[hash_of(made["settings"])] = made
    return list(found.values())


def _fate(run: Run) -> int | None:
    steps = run.settings()["steps"]
    quick = run.method.get("end", 1.0) <= 0.25 and (run.lr or 0) > SIZES[run.size].lr
    return steps // 3 if quick or (run.variant == "all" and run.seed < 2) else None
