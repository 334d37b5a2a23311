"""Baselines that run in an environment of their own (`make baselines`); nothing here is imported by edkm."""
