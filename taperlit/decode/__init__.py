"""Autoregressive decoding: the engine and its cache, sampling, the loop, text as it comes."""

from taperlit.decode.engine import Engine
from taperlit.decode.sampling import Sampling

__all__ = ["Engine", "Sampling"]
