"""From a Hugging Face checkpoint and a plan to an artefact that runs."""
