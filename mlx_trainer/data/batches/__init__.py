"""Which rows make which batch, and the arrays of a batch."""
