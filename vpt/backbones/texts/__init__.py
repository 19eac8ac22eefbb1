"""Families of text towers, one file each, whose `Tower` says which models it fits."""
