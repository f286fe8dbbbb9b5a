"""Disk images of whole systems, made of a distribution's packages: stock ones, with nothing of ours in them."""
