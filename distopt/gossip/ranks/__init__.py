"""Gossip between real ranks: who takes part, and what travels."""
