"""Samples to ids and masks: which tokens a conversation becomes, and which of them are trained."""
