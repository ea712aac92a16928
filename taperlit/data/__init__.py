"""Text in, packed blocks of tokens out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taperlit.data.module import TextDataModule

__all__ = ["TextDataModule"]


def __getattr__(name: str) -> object:
    # The module imports Lightning, which takes seconds; who comes for a tokenizer only does not wait for it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from taperlit.data.module import TextDataModule

    return TextDataModule
