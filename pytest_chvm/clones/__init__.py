"""Saved VMs and what they are made of: the store of templates and snapshots."""
