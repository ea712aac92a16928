import gc

import pytest
import torch

from taperlit.surgery import taper
from taperlit.transformer import Transformer, TransformerConfig

TINY = dict(vocab_size=300, block_size=32, n_layer=2, n_head=2, d_model=32, d_ff=64)


def pytest_collection_finish():
    """Leave what was imported out of later collections: a fit asks for one, and it would take as long as the fit."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAPERLIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny():
    """A builder of tiny transformers with weights that are not symmetric, tapered by name."""

    def build(names=(), **changes) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(**{**TINY, **changes}))
        if names:
            taper(model, names)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif parameter.ndim == 1:
                    parameter.normal_(std=0.1)
        return model

    return build


def write_corpus(folder):
    """Text that compresses: enough for a few hundred blocks of 32 tokens."""
    folder.mkdir()
    for i in range(60):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j} + {i * j % 17}\n" for j in range(10)]
        (folder / f"{i:02}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def corpus(tmp_path):
    """A folder of text."""
    return write_corpus(tmp_path / "corpus")
