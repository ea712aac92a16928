"""``taperlit bench``: side-by-side measurements of decoding, training and folding, as ratios with their spread."""
