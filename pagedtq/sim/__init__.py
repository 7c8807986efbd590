"""Replay of request traces through the page budget, for people who measure utilisation."""
