"""An OpenAI-compatible service over an artefact: `python samples/server ARTEFACT`."""
