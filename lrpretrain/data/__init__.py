"""Text in, rows of token ids out: the same global order on any number of processes."""
