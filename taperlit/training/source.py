"""Which model a run trains: one of our presets with new weights, or a pretrained one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from taperlit.checkpoint.sizes import check_memory
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM, sizes_of
from taperlit.hub.load import build_pretrained, load_pretrained, read_origin, tokenizer_json_of
from taperlit.hub.lora import Lora, add_lora
from taperlit.hub.origin import Origin
from taperlit.transformer import Transformer, TransformerConfig

_PLAIN = {"embed_norm": False, "init": "gpt2"}  # what overlays take back of a preset, and no pretrained model has


@dataclass(frozen=True)
class Preset:
    """A transformer of ours.

    Args:
        config: its shape.
    """

    config: TransformerConfig

    @property
    def sizes(self) -> tuple[int, int]:
        """Vocabulary and longest context, in tokens."""
        return self.config.vocab_size, self.config.block_size

    def load(self) -> Transformer:
        """The model a run starts with: new weights.

        Raises:
            TaperlitError: they are more than the memory.
        """
        check_memory(self.config)
        return Transformer(self.config)

    def build(self) -> Transformer:
        """The model whose weights are to come from a checkpoint."""
        return Transformer(self.config)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have alike."""
        return asdict(self.config)

    def tokenizer_json(self) -> None:
        """It has none of its own."""


@dataclass(frozen=True)
class Pretrained:
    """A ``transformers`` language model.

    Args:
        name: on the hub, of a folder, or of a ``.gguf`` file.
        origin: what was read there.
        lora: adapters to train in its place, or None.
        remote_code: run code that comes with it.
    """

    name: str
    origin: Origin
    lora: Lora | None = None
    remote_code: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Vocabulary and longest context, in tokens."""
        return sizes_of(self.origin.config)

    def load(self) -> CausalLM:
        """The model a run starts with: pretrained weights."""
        return self._adapted(load_pretrained(self.name, self.remote_code))

    def build(self) -> CausalLM:
        """The model whose weights are to come from a checkpoint; it asks neither files nor the network."""
        return self._adapted(build_pretrained(self.origin))

    def _adapted(self, model: CausalLM) -> CausalLM:
        if self.lora is not None:
            add_lora(model, self.lora)
        return model

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have alike: not where the model came from, nor which version wrote its config."""
        config = {name: value for name, value in self.origin.config.items() if not name.startswith("_")}
        config.pop("transformers_version", None)
        return {**config, "lora": self.lora and asdict(self.lora)}

    def tokenizer_json(self) -> str | None:
        """The text of its tokenizer, or None where it has none."""
        return tokenizer_json_of(self.name, self.remote_code)


Source = Preset | Pretrained


def source_of(hparams: Mapping[str, Any], origin: Origin | None = None) -> Source:
    """The model that hyper-parameters of :class:`taperlit.LanguageModel` name.

    Args:
        hparams: ``preset`` and ``overrides``, or ``pretrained``, ``lora`` and ``remote_code``. Overrides that say
            what is so of every pretrained model are ignored beside one.
        origin: of a pretrained model, as a checkpoint holds it; None reads it where ``pretrained`` says.

    Raises:
        TaperlitError: both or neither is named, there is no such preset or field, or the pretrained model cannot be
            read.
    """
    preset, name = hparams.get("preset"), hparams.get("pretrained")
    if (preset is None) == (name is None):
        raise TaperlitError(
            f"model.preset is {preset} and model.pretrained is {name}; give one of them (--model.preset small_1m, or "
            "--model.pretrained NAME_OR_FOLDER and --model.preset null)."
        )
    overrides, lora = hparams.get("overrides"), hparams.get("lora")
    if preset is not None:
        if lora is not None:
            raise TaperlitError("model.lora adapts pretrained models; leave it out with model.preset.")
        return Preset(TransformerConfig.from_preset(preset, **(overrides or {})))
    assert name is not None
    if any(name not in _PLAIN or value != _PLAIN[name] for name, value in (overrides or {}).items()):
        raise TaperlitError("model.overrides changes a preset; leave it out with model.pretrained.")
    remote_code = bool(hparams.get("remote_code"))
    if isinstance(lora, Mapping):
        lora = Lora(**lora)
    return Pretrained(name, origin or read_origin(name, remote_code), lora, remote_code)
