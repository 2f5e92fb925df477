"""What every runtime of attnspan shares: artefact folder, tokenizer, sampling, rows, generation loop."""
