"""Adapters to engines and model libraries; each module names what it was tested with."""
