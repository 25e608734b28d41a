"""Proofs that converted models work: small ones trained on real text, large shapes measured."""
