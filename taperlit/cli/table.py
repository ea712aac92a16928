"""The one table of commands. It imports nothing heavy, so that ``taperlit --help`` answers at once."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command of ``taperlit``.

    Args:
        purpose: one line for the help.
        module: where its function is; imported when the command runs.
        function: the function that runs it. Its parameters are the command's options; their types and docstring are the
            options' help.
        parses: the function takes the command's name and its unparsed arguments instead, and parses them itself.
    """

    purpose: str
    module: str
    function: str
    parses: bool = False


TRAINER = ("taperlit.cli.trainer_help", "run_or_explain", True)

COMMANDS = {
    "fit": Command("train a model", *TRAINER),
    "validate": Command("loss and perplexity of a checkpoint on held-out text", *TRAINER),
    "test": Command("the same, named test/", *TRAINER),
    "predict": Command("write each held-out token's log-probability to a file", *TRAINER),
    "fold": Command(
        "fold a checkpoint whose gate is 0 into a model without those norms", "taperlit.cli.fold", "fold_checkpoint"
    ),
    "generate": Command("continue prompts with a folded model or a checkpoint", "taperlit.cli.generate", "generate"),
    "export": Command(
        "write a folded model for transformers, TransformerLens or onnxruntime", "taperlit.cli.export", "export"
    ),
    "stress": Command("try a model on tokens and prompts that no text has", "taperlit.cli.stress", "stress_model"),
    "report": Command("write an HTML page about runs", "taperlit.cli.report", "report", True),
    "bench": Command("measure decoding, training or folding here, in turns", "taperlit.cli.bench", "bench", True),
}
