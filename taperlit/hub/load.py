"""Pretrained models from the hub, a folder or a GGUF file; and their classes again with no file at all."""

import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from taperlit.checkpoint.plain import check_fields, read_json, read_text
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.gguf_check import check_gguf
from taperlit.hub.origin import CARRIED, Origin

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
MEND = "download it again"
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Buffers that old checkpoints hold and models make themselves now.
_MADE_ANEW = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$")


@dataclass(frozen=True)
class _Place:
    """Where a model's files are.

    Args:
        name: for messages and the origin.
        folder: that holds them.
        gguf: the name of the GGUF file in it, or None.
        on_hub: the folder is a part of the hub's cache, and more of it can be had.
    """

    name: str
    folder: Path
    gguf: str | None = None
    on_hub: bool = False


def read_origin(source: str, remote_code: bool = False) -> Origin:
    """What a pretrained model is, without its weights: only small files are read.

    Args:
        source: a name on the hub, a folder, or a ``.gguf`` file (or a folder that holds one and no ``config.json``).
        remote_code: run the code that comes with the model, where ``transformers`` has none of its own for it.

    Raises:
        TaperlitError: there is no such model, or it is gated; it is no causal language model that ``transformers`` has
            float weights for; it needs code of its own and ``remote_code`` is false; or ``transformers`` is missing.
    """
    return _origin(_locate(source, remote_code), remote_code)


def load_pretrained(source: str, remote_code: bool = False) -> CausalLM:
    """Load a pretrained causal language model.

    Weights stored in bfloat16 or float16 are read as float32, those of a GGUF file are dequantized. All dropout
    probabilities are 0, also where the config has others (GPT-2: 0.1): fine-tuning is to compare one norm with another,
    and the strategies do not draw alike. A download shows its progress; ``transformers`` says nothing but errors.

    Args:
        source: as in :func:`read_origin`.
        remote_code: as in :func:`read_origin`.

    Returns:
        The model on the CPU, in float32 and eval mode, with every weight from the file.

    Raises:
        TaperlitError: as :func:`read_origin`; its weights are pickled, damaged, truncated, or not all that its class
            has; ``transformers`` leaves out a part of the GGUF file; or it lets a token see later ones.
    """
    place = _locate(source, remote_code)
    origin = _origin(place, remote_code)
    transformers = _transformers()
    own_code = not _is_known(origin.config)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": not own_code}
    if place.gguf:
        options["gguf_file"] = place.gguf
        if hasattr(transformers, "GgufConfig"):  # which else keeps the blocks packed where it has kernels for them
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        place = _with_weights(place)
    try:
        config = _own_config(place) if own_code else _config(origin)
        with quiet():
            lm, found = transformers.AutoModelForCausalLM.from_pretrained(
                str(place.folder),
                config=config,
                dtype=torch.float32,
                trust_remote_code=own_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are in the report, which is refused by name
                **options,
            )
    except TaperlitError:
        raise
    except Exception as error:  # whatever the readers of these formats raise
        raise TaperlitError(f"{place.name} cannot be loaded; is it damaged or truncated? ({_words(error)})") from error
    _check_complete(place.name, found)
    if place.gguf:
        check_gguf(place.folder / place.gguf, place.name, lm)
    else:
        _check_values(place, lm)
    for attribute in ("quantization_config", "_pre_quantization_dtype"):  # it was a GGUF's, and is float now
        if hasattr(lm.config, attribute):
            delattr(lm.config, attribute)
    _check_floats(place.name, lm)
    _check_causal(place.name, lm)
    return CausalLM(_finished(lm, origin), origin).eval()


def build_pretrained(origin: Origin) -> CausalLM:
    """Build a pretrained model's class with its initial values; no file is read and no code but ``transformers``' runs.

    Its parameters may hold no memory: see :func:`taperlit.checkpoint.assign.build_hollow`.

    Returns:
        The model in float32 and eval mode, without dropout, as :func:`load_pretrained` gives it.

    Raises:
        TaperlitError: ``transformers`` is missing or has no class for it, as where the model came with code of its own.
    """
    transformers = _transformers()
    if not _is_known(origin.config):
        raise TaperlitError(
            f"{origin.name} is of a class that transformers {transformers.__version__} does not have ("
            f"{origin.config.get('model_type')}); a checkpoint of such a model cannot be loaded without its code."
        )
    with quiet():
        lm = transformers.AutoModelForCausalLM.from_config(
            _config(origin), dtype=torch.float32, trust_remote_code=False
        )
    return CausalLM(_finished(lm, origin), origin).eval()


def tokenizer_json_of(source: str, remote_code: bool = False) -> str | None:
    """The text of a pretrained model's ``tokenizer.json``, made of its other files where it has none.

    Args:
        source: as in :func:`read_origin`.
        remote_code: as in :func:`read_origin`.

    Returns:
        The text, or None where the model has no tokenizer that ``tokenizers`` can be.

    Raises:
        TaperlitError: there is no such model, or it is gated.
    """
    place = _locate(source, remote_code)
    own = place.folder / "tokenizer.json"
    if not place.gguf and own.exists():
        return own.read_text(encoding="utf-8")
    try:
        tokenizer = _tokenizer(place, remote_code)
    except TaperlitError:
        raise
    except Exception:  # it has no tokenizer's files, and each class says so in its own way
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


@contextmanager
def quiet() -> Iterator[None]:
    """Let ``transformers`` show neither progress bars nor warnings inside; exceptions come out as ever."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of its GGUF reader is not one that can be disabled.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise TaperlitError("Pretrained models need transformers: pip install 'taperlit[hub]'.") from error
    return transformers


def _locate(source: str, remote_code: bool) -> _Place:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise TaperlitError(f"{source} is a file, but not a .gguf; name a model's folder, or its name on the hub.")
        return _gguf(path, path.name)
    if path.is_dir():
        return _place_of(path, path.resolve().name)
    if not _HUB_NAME.fullmatch(source) or source.startswith(".") or path.suffix == ".gguf":
        raise TaperlitError(f"There is no folder or .gguf file {source}.")
    _transformers()
    patterns = (*_SMALL, "*.py") if remote_code else _SMALL
    return _Place(source, _fetch(source, patterns), on_hub=True)


def _place_of(folder: Path, name: str) -> _Place:
    if (folder / "adapter_config.json").exists():
        raise TaperlitError(f"{name} holds an adapter; merge it into its base model, save that and give its folder.")
    if (folder / "config.json").exists():
        return _Place(name, folder)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0], files[0].name)
    if files:
        raise TaperlitError(f"{folder} holds several .gguf files; name one of {', '.join(p.name for p in files)}.")
    raise TaperlitError(f"{folder} has no config.json, so it is no pretrained model's folder.")


def _gguf(path: Path, name: str) -> _Place:
    _transformers()
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise TaperlitError(f"GGUF files need the package {package}: pip install 'taperlit[hub]'.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise TaperlitError(f"{name} is not a GGUF file: it does not begin as one.")
    return _Place(name, path.parent, path.name)


def _fetch(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A model's files of these patterns from the hub, or from its cache where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    gated = TaperlitError(
        f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`."
    )
    offline = False
    try:
        HfApi().auth_check(name)  # fails at once where there is no network; downloads would try again for half a minute
    except GatedRepoError as error:
        raise gated from error
    except RepositoryNotFoundError as error:
        raise TaperlitError(
            f"The hub has no model {name} (a private one needs `hf auth login`), and there is no such folder here."
        ) from error
    except HfHubHTTPError:
        pass  # reached; what it will not give is told below
    except Exception:  # each version's own network errors
        offline = True
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise TaperlitError(
            f"The hub cannot be reached and its cache here has no {name}; go online, or give a model's folder."
        ) from error
    except GatedRepoError as error:
        raise gated from error
    except Exception as error:
        raise TaperlitError(f"{name} cannot be had from the hub ({_words(error)}).") from error


def _weight_files(folder: Path) -> list[str]:
    """The names of a model's safetensors files: one, or those that its index names."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [WEIGHTS]
    content = read_json(index, MEND)
    places: Any = content.get("weight_map") if isinstance(content, dict) else content
    check_fields(places, dict[str, str], index, "weight_map", MEND)
    return sorted(set(places.values()))


def _with_weights(place: _Place) -> _Place:
    """The same with its safetensors files there.

    Raises:
        TaperlitError: it has none, or not all of them.
    """
    files = _weight_files(place.folder)
    if place.on_hub:
        # The snapshot's folder is called after its commit: weights and config are of one.
        place = _Place(place.name, _fetch(place.name, [*_SMALL, "*.py", *files], place.folder.name), on_hub=True)
    missing = [file for file in files if not (place.folder / file).exists()]
    if missing and files == [WEIGHTS]:
        raise TaperlitError(
            f"{place.name} has no {WEIGHTS}; pickled weights (.bin, .pt) can run code when they are read, so they are "
            "not. If you trust them, convert them: transformers.AutoModelForCausalLM.from_pretrained("
            f"{place.name if place.on_hub else str(place.folder)!r}).save_pretrained(FOLDER), and AutoTokenizer "
            "likewise."
        )
    if missing:
        raise TaperlitError(f"{place.name} has no {missing[0]}, which its {INDEX} names; download it again.")
    return place


def _origin(place: _Place, remote_code: bool) -> Origin:
    if place.gguf:
        try:
            files = _files_of_gguf(place)
        except Exception as error:
            raise TaperlitError(
                f"{place.name} cannot be read; is it truncated, or of an architecture that transformers does not know? "
                f"({_words(error)})"
            ) from error
    else:
        paths = (place.folder / name for name in CARRIED)
        files = {path.name: read_text(path, MEND) for path in paths if path.exists()}
    if "config.json" not in files:
        raise TaperlitError(f"{place.name} has no config.json, so it is no pretrained model.")
    for name, text in files.items():
        try:
            good = not name.endswith(".json") or isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise TaperlitError(f"{place.name}: {name} is damaged: it is not a JSON object; {MEND}.")
    origin = Origin(place.name, files)
    _check_config(place.name, origin.config, remote_code)
    return origin


def _files_of_gguf(place: _Place) -> dict[str, str]:
    """The small files that a folder would hold, made of the header of a GGUF file."""
    transformers = _transformers()
    where = {"pretrained_model_name_or_path": str(place.folder), "gguf_file": place.gguf}
    with quiet(), tempfile.TemporaryDirectory() as made:
        config = transformers.AutoConfig.from_pretrained(**where, trust_remote_code=False)
        generation = transformers.GenerationConfig.from_model_config(config)
        if lm := transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None):
            config.architectures = [lm.__name__]
        generation._from_model_config = False  # from here on it is a file of its own
        generation.save_pretrained(made)
        tokenizer = _tokenizer(place, remote_code=False)
        for word in ("is_local", "local_files_only"):  # how it was read, which would be kept with what it is
            tokenizer.init_kwargs.pop(word, None)
        tokenizer.save_pretrained(made)
        files = {path.name: path.read_text(encoding="utf-8") for path in Path(made).iterdir() if path.name in CARRIED}
    words = config.to_diff_dict()
    for word in ("quantization_config", "_model_name_or_path"):
        words.pop(word, None)
    return {"config.json": json.dumps(words, indent=2, sort_keys=True) + "\n", **files}


def _tokenizer(place: _Place, remote_code: bool) -> Any:
    options = {"gguf_file": place.gguf} if place.gguf else {}
    with quiet():
        return _transformers().AutoTokenizer.from_pretrained(
            str(place.folder), trust_remote_code=remote_code, local_files_only=not remote_code, **options
        )


def _is_known(config: dict[str, Any]) -> bool:
    """Whether ``transformers`` has a causal language model of its own for a ``config.json``."""
    transformers = _transformers()
    kind = config.get("model_type")
    return (
        kind in transformers.CONFIG_MAPPING
        and transformers.CONFIG_MAPPING[kind] in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )


def _check_config(name: str, config: dict[str, Any], remote_code: bool) -> None:
    """Refuse what is no causal language model with float weights, or needs code that was not asked for.

    Raises:
        TaperlitError: with the reason.
    """
    if str(config.get("format", "")).startswith("taperlit-"):
        raise TaperlitError(
            f"{name} is a folded model of taperlit, which has no norms to taper; give a pretrained one."
        )
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise TaperlitError(f"{name} is an encoder-decoder ({kind}), not a causal language model.")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise TaperlitError(
            f"{name} is quantized ({method}), and tapering trains float weights; give the model it was made from."
        )
    if _is_known(config):
        return
    if "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        raise TaperlitError(f"{name} is no causal language model that transformers knows (model_type {kind!r}).")
    if not remote_code:
        raise TaperlitError(
            f"{name} is a {kind}, which transformers can only build by running the code that comes with the model; if "
            "you trust it, `taperlit fit --model.remote_code true` trains it, and "
            "load_pretrained(..., remote_code=True) loads it."
        )


def _config(origin: Origin) -> Any:
    """The config of ``transformers``' own class: float32, without dropout, attention as the class does it best."""
    words = {key: value for key, value in origin.config.items() if key.lstrip("_") != "attn_implementation"}
    config = _transformers().CONFIG_MAPPING[words["model_type"]].from_dict(words)
    config.dtype = torch.float32
    return _without_dropout(config)


def _own_config(place: _Place) -> Any:
    """The config of a model that comes with its own code, which is run here."""
    with quiet():
        return _without_dropout(_transformers().AutoConfig.from_pretrained(str(place.folder), trust_remote_code=True))


def _without_dropout(config: Any) -> Any:
    """The same config with every probability of dropout 0, those that its file leaves to the class's defaults too."""
    for key, value in vars(config).items():
        # OPT's layerdrop and GPT-2's attn_pdrop among them; a flag or a list that is called so is none.
        if "drop" in key and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, key, type(value)(0))  # MPT's is a whole number
        elif isinstance(value, _transformers().PretrainedConfig):
            _without_dropout(value)
    return config


def _finished(lm: Any, origin: Origin) -> Any:
    """The model with its generation config, and experts that compute in any dtype.

    ``transformers``' own choice for a mixture of experts is a kernel without float64, where foldings are proven.
    """
    if hasattr(lm, "set_experts_implementation"):
        lm.set_experts_implementation("eager")
    if text := origin.files.get("generation_config.json"):
        with quiet():
            lm.generation_config = _transformers().GenerationConfig.from_dict(json.loads(text))
    return lm


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """Refuse a model that some weights were not found for, or the other way round.

    ``transformers`` would begin to train such weights from random values, with a warning.
    """
    for problem, what in (
        ("missing_keys", "is in its class, but not in its weights"),
        ("mismatched_keys", "has another shape in its weights than in its class"),
        ("unexpected_keys", "is in its weights, but not in its class"),
    ):
        keys = [key if isinstance(key, str) else key[0] for key in found.get(problem) or ()]
        keys = sorted(key for key in keys if problem != "unexpected_keys" or not _MADE_ANEW.search(key))
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise TaperlitError(f"{name}: {keys[0]}{more} {what}; it is not the model that its config.json says.")
    if errors := found.get("error_msgs"):
        raise TaperlitError(f"{name} cannot be loaded ({_words(errors[0])}).")


def _check_values(place: _Place, lm: nn.Module) -> None:
    """Refuse a model whose weights are not the file's: a class that sets some again once they are read (Youtu's rows of
    padding). Those that ``transformers`` gives another name or shape are left out.
    """
    own = lm.state_dict()
    for file in _weight_files(place.folder):
        with safe_open(place.folder / file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (it is no mapping)
                if key not in own or stored.get_slice(key).get_shape() != list(own[key].shape):
                    continue
                if not torch.equal(stored.get_tensor(key).to(own[key].dtype), own[key]):
                    raise TaperlitError(
                        f"{place.name}: {key} is not what {file} has: its class in transformers changes it when it is "
                        "read; make that value in the file what the class makes of it."
                    )


def _check_floats(name: str, lm: nn.Module) -> None:
    for key, parameter in lm.named_parameters():
        if parameter.dtype != torch.float32 or parameter.is_meta:
            raise TaperlitError(f"{name}: {key} was read as {parameter.dtype}, and tapering trains float32 weights.")


@torch.no_grad()
def _check_causal(name: str, lm: Any) -> None:
    """Refuse a model whose logits at a token change with a later one: BERT has a class for causal models too."""
    lm.eval()
    tokens = torch.tensor([[3, 1, 4, 1], [3, 1, 4, 2]]) % lm.config.get_text_config().vocab_size
    first, other = lm(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    if (first - other).abs().max() > 1e-3 * first.abs().max():
        raise TaperlitError(f"{name} is no causal language model: a token's logits change with later tokens.")


def _words(error: object) -> str:
    """An exception's message on one line, shortened."""
    return " ".join(str(error).split())[:200] or type(error).__name__
