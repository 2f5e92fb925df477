"""What matters: corpora, influence profiles, validation and evaluation of plans."""
