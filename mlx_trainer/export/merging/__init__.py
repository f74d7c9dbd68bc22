"""An adapter becomes a model, or some become one: written whole or not at all, and measured."""
