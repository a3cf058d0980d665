"""Ranks that exchange while others are lost, leave and come: who takes part, and how they agree on it."""
