"""Baselines that run in a separate environment (`make baselines`); nothing here is imported by edkm."""
