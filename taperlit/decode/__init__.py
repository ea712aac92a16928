"""Autoregressive decoding: sampling, the loop over the KV cache, text as it comes."""
