"""Folded models that no stock class can hold, loaded by the Auto classes of ``transformers``: no remote code.

After ``import taperlit`` their ``config.json``, whose ``model_type`` is ``taperlit``, is read by a subclass of the
stock config class, and their model is of a subclass of the stock model's that applies the record of structure before
weights are loaded. All else is the stock class's: ``generate``, caches, ``device_map``, ``save_pretrained``.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from taperlit.errors import TaperlitError

MODEL_TYPE = "taperlit"
PREFIX = "Folded"
"""How the names of the subclasses begin; the stock class's name follows."""


def register_when_imported() -> None:
    """Make the Auto classes know folded models as soon as ``transformers`` is imported, before or after this.

    Nothing is imported for it: neither ``transformers`` nor torch.
    """
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _Afterwards(name, register))


class _Afterwards(MetaPathFinder):
    """Calls a function once, right after a module of a name was imported.

    It is how ``import taperlit`` can register in ``transformers`` without importing it, which takes seconds.
    """

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find the module, and call the function when it has run."""
        if fullname != self.name or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.function()

            spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, _any_config(), exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(_any_config(), _any_model(), exist_ok=True)


_MADE: dict[Any, Any] = {}  # each stock config class and its subclass

_REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


@cache
def _any_config() -> Any:
    """The class that the Auto classes know ``model_type`` taperlit by; what it reads is of the right subclass."""
    from transformers.configuration_utils import PretrainedConfig

    class AnyFoldedConfig(PretrainedConfig):
        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            import transformers

            classes: Any = transformers.CONFIG_MAPPING
            base = str(config_dict.get("base_model_type"))
            if base not in classes or base == MODEL_TYPE:
                raise TaperlitError(
                    f"transformers {transformers.__version__} has no {base!r}, the kind of model that this was folded "
                    "from; install a version that has."
                )
            return folded_config_class(classes[base]).from_dict(config_dict, **kwargs)

    return AnyFoldedConfig


@cache
def _any_model() -> Any:
    """Stands in the Auto classes' table beside :func:`_any_config`, so that folded models count as causal ones."""

    class AnyFoldedForCausalLM:
        config_class = _any_config()

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(*args, **kwargs)

    return AnyFoldedForCausalLM


def folded_config_class(stock: Any) -> Any:
    """The subclass of a stock config class for folded models of it.

    Its ``base_model_type`` is the stock ``model_type``, its ``structure`` the record of structure (see
    :class:`taperlit.structure.Structure`), with names as the stock model has them.

    Args:
        stock: of ``transformers``, with a causal language model.

    Returns:
        The class, registered together with that of the model.
    """
    if stock not in _MADE:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        made = type(PREFIX + stock.__name__, (stock,), {"model_type": MODEL_TYPE, "__module__": __name__})
        AutoModelForCausalLM.register(made, _model_class(MODEL_FOR_CAUSAL_LM_MAPPING[stock], made), exist_ok=True)
        _MADE[stock] = made
    return _MADE[stock]


def _model_class(stock: Any, config_class: Any) -> Any:
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from taperlit.structure import apply_structure  # which imports torch

        stock.__init__(self, config, *args, **kwargs)
        apply_structure(self, config.structure)

    words = {"__init__": build, "config_class": config_class, "__module__": __name__, "__doc__": stock.__doc__}
    return type(PREFIX + stock.__name__, (stock,), words)


def fold_config(config: Any, structure: Any) -> Any:
    """The config of a folded model.

    Args:
        config: of the stock model that was folded.
        structure: the record of structure, with names as the stock model has them.
    """
    words = {**config.to_dict(), "model_type": MODEL_TYPE, "base_model_type": config.model_type}
    words.pop("architectures", None)
    stock: Any = type(config)
    return folded_config_class(stock).from_dict({**words, "structure": structure})


def stock_config(config: Any) -> Any:
    """The config of the stock model that was folded; any other config is returned as it is."""
    if not is_folded(config):
        return config
    from transformers import CONFIG_MAPPING

    words = {**config.to_dict(), "model_type": config.base_model_type}
    for word in ("base_model_type", "structure", "architectures"):
        words.pop(word, None)
    return CONFIG_MAPPING[config.base_model_type].from_dict(words)


def is_folded(config: Any) -> bool:
    """Whether a config is one of :func:`fold_config`."""
    return bool(getattr(config, "model_type", None) == MODEL_TYPE)


def __getattr__(name: str) -> Any:
    """The subclasses by name, so that they can be pickled."""
    stock: type[Any] | None = None
    if name.startswith(PREFIX):
        import transformers

        stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if isinstance(stock, type) and issubclass(stock, transformers.PretrainedConfig):
        return folded_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[folded_config_class(stock.config_class)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
