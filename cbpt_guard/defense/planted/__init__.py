"""Planted triggers, a module for each kind: what an attacker does to an image; `defense/triggers.py` knows them all."""
