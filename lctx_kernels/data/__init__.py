"""Text for demos and tests: documents that the machine already has, never downloaded."""
