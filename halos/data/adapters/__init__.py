"""Adapters of published data sets whose rows no schema tells by their columns: `format: shp` of an entry."""
