"""Plugins that carry attnspan's ops to other runtimes."""
