"""Text in, packed blocks of tokens out."""

from taperlit.data.module import TextDataModule

__all__ = ["TextDataModule"]
