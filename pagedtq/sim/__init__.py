"""Replay of request traces: workloads, continuous batching over pages, reports and plots."""
