"""Rewrites: each replaces the attention nodes of the normal form by the form of one target."""
