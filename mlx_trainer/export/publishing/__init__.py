"""To the Hub: what belongs there, a model card of what was measured, and the upload."""
