"""Adapters for model libraries; each is an extra of its own and imported by name."""
