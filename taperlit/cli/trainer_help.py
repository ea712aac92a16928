"""What people change of ``taperlit fit``, ``validate``, ``test`` and ``predict``, told without importing a trainer."""

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

ALL = "--help.all"  # the parser's own help


class Option(NamedTuple):
    """An option of the short help.

    Args:
        name: without the dashes.
        value: its default, or what to give where it has none.
        purpose: one line.
        only: the one command that has a use for it, or None.
    """

    name: str
    value: str
    purpose: str
    only: str | None = None


GROUPS = {
    "config": (
        Option("config", "FILE", "options as YAML; may be given several times, and later ones win"),
        Option("ckpt_path", "FILE", "a checkpoint to go on from, or to evaluate; last is that of the newest run"),
        Option("seed_everything", "0", "of the first weights and of dropout; the order's is data.seed", "fit"),
        Option("print_config", "", "print all options as YAML, as they would be used"),
    ),
    "data": (
        Option("data.files", "GLOBS", ".jsonl (.zst, .gz), .parquet, or plain text; by default Python's own source"),
        Option("data.hub", "NAME", "a data set of the hub in their place"),
        Option("data.tokenizer", "FILE", "a tokenizer.json, or a name on the hub; by default one is trained"),
        Option("data.vocab_size", "4096", "of a tokenizer that is trained"),
        Option("data.block_size", "512", "tokens of a block"),
        Option("data.batch_size", "16", "blocks of a batch, per device"),
        Option("data.val_fraction", "0.01", "share of the documents that is held out"),
        Option("data.cache_dir", "FOLDER", "where tokens are kept"),
    ),
    "model": (
        Option("model.preset", "NAME", "a shape: small_1m, small_9m, gpt2_124m, llama_350m, ..."),
        Option("model.overrides", "YAML", "fields of the shape: '{d_model: 128, n_layer: 4}'; null clears them"),
        Option("model.pretrained", "NAME", "a model of the hub, a folder or a .gguf file in place of a preset"),
        Option("model.lr", "0.0006", "peak learning rate", "fit"),
        Option("model.weight_decay", "0.1", "of AdamW", "fit"),
        Option("model.warmup", "0.05", "of the learning rate, in steps (5) or as a share of the run (0.05)", "fit"),
        Option("model.compile", "false", "compile the blocks for training", "fit"),
    ),
    "taper": (
        Option("model.taper", "none", "which norms: none, attention, internal or all; or fakeln, dyt, derf"),
        Option("taper.anchor", "true", "the scale loss; runs where norms are tapered", "fit"),
        Option("taper.gate.warmup", "0.05", "the gate is 1 until then, in steps or as a share of the run", "fit"),
        Option("taper.gate.end", "0.5", "and 0 from then on", "fit"),
        Option("taper.fold", "true", "write the folded model at the end", "fit"),
        Option("taper.guard.skip", "false", "leave out a step that is not finite, and do not stop", "fit"),
    ),
    "run": (
        Option("trainer.max_steps", "STEPS", "optimizer steps of the run", "fit"),
        Option("trainer.accumulate_grad_batches", "1", "batches per step", "fit"),
        Option("trainer.gradient_clip_val", "NORM", "clip the gradients' norm", "fit"),
        Option("trainer.val_check_interval", "BATCHES", "batches between two validations", "fit"),
        Option("trainer.limit_val_batches", "BATCHES", "of a validation; by default all"),
        Option("trainer.default_root_dir", "FOLDER", "where runs are written that have no logger with a save_dir"),
    ),
    "devices": (
        Option("trainer.accelerator", "auto", "cpu, gpu, ..."),
        Option("trainer.devices", "auto", "how many, or which"),
        Option("trainer.strategy", "auto", "ddp, ...; configs/strategy has overlays"),
        Option("trainer.precision", "TYPE", "32-true, which is the default, bf16-mixed, bf16-true, 16-mixed, ..."),
    ),
}


def short_help(command: str) -> str:
    """One screen: the options that people change.

    Args:
        command: of the trainer's four.
    """
    from taperlit.cli.table import COMMANDS

    lines = [f"usage: taperlit {command} --config FILE [--config FILE ...] [options]", "", COMMANDS[command].purpose]
    chosen = {
        group: [option for option in options if option.only in (None, command)] for group, options in GROUPS.items()
    }
    width = max(len(f"--{o.name} {o.value}") for options in chosen.values() for o in options)
    for group, options in chosen.items():
        lines += ["", group]
        lines += [f"  {f'--{o.name} {o.value}':<{width}}  {o.purpose}" for o in options]
    return "\n".join(
        [
            *lines,
            "",
            "Small letters and numbers are defaults.",
            f"taperlit {command} {ALL} lists every option, some 800 lines; --taper.gate.help those of a callback.",
        ]
    )


def run_or_explain(command: str, args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``, or print the short help.

    Raises:
        TaperlitError: whatever the user can mend.
    """
    if "-h" in args or "--help" in args:
        print(short_help(command))
        return
    train = import_module("taperlit.cli.train")
    train.run_trainer(command, ["--help" if arg == ALL else arg for arg in args])
