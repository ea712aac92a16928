"""``transformers``' models in, as they are or as ours, and out again; ``transformers`` is imported when it is used."""
