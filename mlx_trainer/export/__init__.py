"""Handing over what was trained: to the Hub, and to other programs."""
