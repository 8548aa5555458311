"""From text to batches: tokenizers, tokenised files, and the order in which they are read."""
