"""Folders that other programs serve artefacts from: `attnspan package`."""
